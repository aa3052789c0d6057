#include "json.hpp"

#include <cmath>
#include <cstdlib>
#include <set>

#include "tokexport/tokexport.hpp"

namespace tokexport {
namespace {

constexpr int kDeepest = 64;

class Parser {
 public:
  Parser(const std::string& text, const std::string& name) : text_(text), name_(name) {}

  Json document() {
    Json json = value(0);
    space();
    if (at_ != text_.size()) fail("something follows the value");
    return json;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(Fault::usage, name_ + " is not JSON (" + what + " at byte " + std::to_string(at_) + "): it is damaged, make it again");
  }

  void space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) ++at_;
  }

  char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void expect(const std::string& word) {
    if (text_.compare(at_, word.size(), word) != 0) fail("wanted " + word);
    at_ += word.size();
  }

  Json value(int depth) {
    if (depth > kDeepest) fail("it is nested too deep");
    space();
    Json json;
    switch (next()) {
      case '{': json.value = object(depth); break;
      case '[': json.value = array(depth); break;
      case '"': json.value = string(); break;
      case 't': expect("true"); json.value = true; break;
      case 'f': expect("false"); json.value = false; break;
      case 'n': expect("null"); break;
      default: json.value = number();
    }
    return json;
  }

  Json::Object object(int depth) {
    Json::Object members;
    std::set<std::string> names;
    ++at_;
    space();
    if (next() == '}') { ++at_; return members; }
    for (;;) {
      space();
      if (next() != '"') fail("wanted a field");
      std::string name = string();
      if (!names.insert(name).second) fail("a field stands twice");
      space();
      expect(":");
      members.emplace_back(std::move(name), value(depth + 1));
      space();
      if (next() == '}') { ++at_; return members; }
      expect(",");
    }
  }

  Json::Array array(int depth) {
    Json::Array items;
    ++at_;
    space();
    if (next() == ']') { ++at_; return items; }
    for (;;) {
      items.push_back(value(depth + 1));
      space();
      if (next() == ']') { ++at_; return items; }
      expect(",");
    }
  }

  double number() {
    std::size_t start = at_;
    auto digits = [&] {
      std::size_t first = at_;
      while (next() >= '0' && next() <= '9') ++at_;
      if (at_ == first) fail("wanted a value");
      return at_ - first;
    };
    if (next() == '-') ++at_;
    char lead = next();
    if (digits() > 1 && lead == '0') fail("a number begins with 0");
    if (next() == '.') { ++at_; digits(); }
    if (next() == 'e' || next() == 'E') {
      ++at_;
      if (next() == '+' || next() == '-') ++at_;
      digits();
    }
    double number = std::strtod(text_.substr(start, at_ - start).c_str(), nullptr);
    if (!std::isfinite(number)) fail("a number is too large");
    return number;
  }

  unsigned hex() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i) {
      char c = next();
      unsigned digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : 16;
      if (digit > 15) fail("wanted four hexadecimal digits");
      code = code * 16 + digit;
      ++at_;
    }
    return code;
  }

  static void append_utf8(std::string& out, unsigned code) {
    if (code < 0x80) {
      out += static_cast<char>(code);
    } else if (code < 0x800) {
      out += static_cast<char>(0xC0 | code >> 6);
      out += static_cast<char>(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      out += static_cast<char>(0xE0 | code >> 12);
      out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
      out += static_cast<char>(0x80 | (code & 0x3F));
    } else {
      out += static_cast<char>(0xF0 | code >> 18);
      out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
      out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
      out += static_cast<char>(0x80 | (code & 0x3F));
    }
  }

  std::string string() {
    std::string out;
    ++at_;
    for (;;) {
      if (at_ >= text_.size()) fail("a text does not end");
      unsigned char c = text_[at_++];
      if (c == '"') return out;
      if (c < 0x20) fail("a control character in a text");
      if (c != '\\') { out += static_cast<char>(c); continue; }
      char escape = next();
      ++at_;
      static const std::string names = "\"\\/bfnrt", codes = "\"\\/\b\f\n\r\t";
      std::size_t place = names.find(escape);
      if (escape == 'u') {
        unsigned code = hex();
        if (code >= 0xD800 && code < 0xDC00) {
          expect("\\u");
          unsigned low = hex();
          if (low < 0xDC00 || low > 0xDFFF) fail("half a character");
          code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        } else if (code >= 0xDC00 && code < 0xE000) {
          fail("half a character");
        }
        append_utf8(out, code);
      } else if (escape != '\0' && place != std::string::npos) {
        out += codes[place];
      } else {
        fail("an unknown escape");
      }
    }
  }

  const std::string& text_;
  const std::string& name_;
  std::size_t at_ = 0;
};

}  // namespace

Json Json::parse(const std::string& text, const std::string& name) { return Parser(text, name).document(); }

template <class T>
const T& Field::as(const char* words) const {
  if (const T* value = std::get_if<T>(&json_->value)) return *value;
  throw Error(Fault::usage, where_ + ": wanted " + words);
}

Field Field::operator[](const std::string& name) const {
  for (const auto& member : as<Json::Object>("an object"))
    if (member.first == name) return Field(member.second, where_ + ": " + name);
  throw Error(Fault::usage, where_ + ": field '" + name + "' is missing");
}

bool Field::has(const std::string& name) const {
  for (const auto& member : as<Json::Object>("an object"))
    if (member.first == name) return true;
  return false;
}

std::string Field::text() const { return as<std::string>("text"); }
double Field::number() const { return as<double>("a number"); }
bool Field::boolean() const { return as<bool>("true or false"); }

std::int64_t Field::integer() const {
  double number = as<double>("a whole number");
  if (number != std::floor(number) || std::abs(number) > 9e15) throw Error(Fault::usage, where_ + ": wanted a whole number");
  return static_cast<std::int64_t>(number);
}

std::vector<Field> Field::list() const {
  std::vector<Field> items;
  const auto& array = as<Json::Array>("a list");
  for (std::size_t i = 0; i < array.size(); ++i) items.emplace_back(array[i], where_ + "[" + std::to_string(i) + "]");
  return items;
}

std::vector<std::pair<std::string, Field>> Field::members() const {
  std::vector<std::pair<std::string, Field>> items;
  for (const auto& member : as<Json::Object>("an object")) items.emplace_back(member.first, Field(member.second, where_ + ": " + member.first));
  return items;
}

}  // namespace tokexport
