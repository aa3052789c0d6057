// JSON, strictly: no comments, no NaN, no field twice, at most 64 levels deep. Written out so that nothing has to be installed for it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace tokexport {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value = nullptr;

  // name: of the document, for messages. Throws Error for what is no JSON.
  static Json parse(const std::string& text, const std::string& name);
};

// A value and where it stands, for messages; every accessor throws Error for a value of another kind.
class Field {
 public:
  Field(const Json& json, std::string where) : json_(&json), where_(std::move(where)) {}

  Field operator[](const std::string& name) const;
  bool has(const std::string& name) const;
  bool is_null() const { return std::holds_alternative<std::nullptr_t>(json_->value); }
  std::string text() const;
  double number() const;
  std::int64_t integer() const;  // a whole number
  bool boolean() const;
  std::vector<Field> list() const;
  std::vector<std::pair<std::string, Field>> members() const;
  const std::string& where() const { return where_; }

 private:
  template <class T>
  const T& as(const char* words) const;
  const Json* json_;
  std::string where_;
};

}  // namespace tokexport
