#include "manifest.hpp"

#include <cmath>
#include <set>

#include "files.hpp"
#include "json.hpp"
#include "tokexport/tokexport.hpp"

namespace tokexport {
namespace {

std::vector<std::int64_t> shape_of(const Field& field) {
  std::vector<std::int64_t> shape;
  for (const Field& axis : field.list()) {
    shape.push_back(axis.is_null() ? kAny : axis.integer());
    if (shape.back() < 1 && !axis.is_null()) refuse(axis.where(), "wanted a length above 0, or null");
  }
  if (shape.empty()) refuse(field.where(), "wanted the batch first");
  return shape;
}

TensorEntry tensor_entry(const Field& field) { return {field["name"].text(), field["type"].text(), shape_of(field["shape"])}; }

OutputEntry output_entry(const Field& field) {
  OutputEntry entry;
  static_cast<TensorEntry&>(entry) = tensor_entry(field);
  entry.kind = field["kind"].text();
  entry.exact = field["exact"].boolean();
  entry.by_row = field["by_row"].boolean();
  entry.limit = field["limit"].number();
  entry.own_limit = field["own_limit"].number();
  return entry;
}

Preprocessing to_input(const Field& field, const TensorEntry& input) {
  Preprocessing p = preprocessing_of(field);
  p.channels = static_cast<int>(field["channels"].integer());
  p.nhwc = field["layout"].text() == "nhwc";
  p.normalised = field["normalised"].boolean();
  check_preprocessing(p, input, field.where());
  return p;
}

Decision decision_of(const Field& field) {
  Decision d;
  d.block = static_cast<int>(field["block"].integer());
  d.n_in = field["n_in"].integer();
  d.n_kept = field["n_kept"].integer();
  d.n_out = field["n_out"].integer();
  d.n_folded = field["n_folded"].integer();
  d.near_tie = field["near_tie"].number();
  for (auto& [part, name] : field["parts"].members()) d.parts[part] = name.text();
  for (const Field& label : field["row_labels"].list()) d.row_labels.push_back(label.integer());
  bool counts = 1 <= d.n_kept && d.n_kept <= d.n_out && d.n_out <= d.n_in && d.n_in <= 1 << 20 && 0 <= d.n_folded &&
                d.n_folded <= d.n_in - d.n_kept && d.n_out - d.n_kept <= (d.n_folded ? 1 : 0);
  bool hosts = !d.n_folded || d.n_out > d.n_kept || (static_cast<std::int64_t>(d.row_labels.size()) == d.n_kept && (d.parts.count("dst") || d.parts.count("target")));
  if (!counts || !hosts || !(d.parts.count("order") || (d.parts.count("keep") && (d.parts.count("src") || !d.n_folded))))
    refuse(field.where(), "the counts or parts do not fit each other");
  return d;
}

void check_classes(const Manifest& m, const std::string& where) {
  if (!m.labels.empty() && static_cast<std::int64_t>(m.labels.size()) != m.classes)
    refuse(where, "labels: " + std::to_string(m.labels.size()) + " of " + std::to_string(m.classes) + " classes");
  for (const OutputEntry& o : m.outputs)
    if (o.kind == "logits" && o.shape.back() != m.classes) refuse(where, "classes: " + std::to_string(m.classes) + ", which is not what " + o.name + " has");
  check_activation(m.activation, where);
}

}  // namespace

void check_activation(const std::string& activation, const std::string& where) {
  static const std::set<std::string> known = {"softmax", "sigmoid", "none"};
  if (!known.count(activation)) refuse(where, "activation '" + activation + "' is not known");
}

Manifest Manifest::read(const std::string& folder) {
  std::string path = plain_file(folder, "tokexport.json");
  if (size_of(path) > 64 << 20) refuse(path, "it is too large to be a manifest");
  Json json = Json::parse(read_file(path), path);
  Field root(json, path);
  check_format(root);
  Manifest m;
  m.folder = folder;
  m.version = root["version"].text();
  m.kind = root["kind"].text();
  m.file = file_entry(root["file"]);
  for (const Field& entry : root["beside"].list()) m.beside.push_back(file_entry(entry));
  auto inputs = root["inputs"].list();
  if (inputs.size() != 1) refuse(path, "wanted one input");
  m.input = tensor_entry(inputs[0]);
  if (m.input.shape.size() != 4) refuse(path, "wanted an input of four axes");
  for (const Field& output : root["outputs"].list()) m.outputs.push_back(output_entry(output));
  if (m.outputs.empty()) refuse(path, "wanted an output");
  m.preprocessing = to_input(root["preprocessing"], m.input);
  m.classes = root["classes"].integer();
  for (const Field& label : root["labels"].list()) m.labels.push_back(label.text());
  m.activation = root["activation"].text();
  m.precision = root["precision"].text();
  for (const Field& step : root["decisions"].list()) m.decisions.push_back(decision_of(step));
  m.ordered = root["ordered"].boolean();
  m.tokens = root["tokens"].integer();
  Field proof = root["proof"];
  m.proof = file_entry(proof["file"]);
  m.proof_images = proof["images"].integer();
  m.photos = proof["photos"].boolean();
  if (m.tokens < 1 || m.tokens > 1 << 20 || m.proof_images < 1 || m.proof_images > 4096) refuse(path, "tokens and images of the proof must be above 0");
  if (!root["builder"].is_null()) {
    Field builder = root["builder"];
    m.builder = {builder["name"].text(), builder["version"].text(), builder["host_code"].boolean()};
  }
  if ((m.kind != "onnx" && m.kind != "engine") || (m.kind == "engine") == m.builder.name.empty()) refuse(path, "kind: wanted onnx, or engine with its builder");
  Field provenance = root["provenance"];
  m.reduces = provenance.has("schedule") && provenance["schedule"].has("method") && provenance["schedule"]["method"].text() != "none";
  check_classes(m, path);
  return m;
}

void Manifest::check_files(bool hashes) const {
  std::vector<FileEntry> files = {file, proof};
  files.insert(files.end(), beside.begin(), beside.end());
  for (const FileEntry& entry : files) check_file(folder, entry, "tokexport.json", "bundle", hashes);
}

}  // namespace tokexport
