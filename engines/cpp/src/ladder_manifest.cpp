#include "ladder_manifest.hpp"

#include <sys/stat.h>

#include <set>

#include "files.hpp"
#include "json.hpp"
#include "tokexport/tokexport.hpp"

namespace tokexport {
namespace {

const char kName[] = "ladder.json", kKind[] = "ladder";
constexpr std::int64_t kLargest = 16 << 20;  // bytes of a manifest

// The folder of a ladder that is named by it or by its manifest.
std::string folder_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  const std::string last = slash == std::string::npos ? path : path.substr(slash + 1);
  if (last != kName) return path;
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

Rung rung_of(const Field& field) {
  Rung rung;
  rung.label = field["label"].text();
  rung.method = field["method"].text();
  for (const Field& n : field["tokens"].list()) rung.tokens.push_back(n.integer());
  rung.macs = field["macs"].integer();
  rung.macs_ratio = field["macs_ratio"].number();
  rung.ms = field["ms"].number();
  rung.speedup = field["speedup"].number();
  rung.error = field["error"].number();
  if (rung.ms <= 0 || rung.macs <= 0) refuse(field.where(), "wanted times and multiply-accumulates above 0");
  return rung;
}

// What the provenance of the first rung says of all of them: they differ in their schedules alone.
Manifest file_of(const Field& provenance, std::int64_t batch) {
  check_format(provenance);
  Manifest m;
  m.kind = "onnx";
  m.version = provenance["version"].text();
  m.precision = provenance["precision"].text();
  m.preprocessing = preprocessing_of(provenance["preprocess"]);
  Preprocessing& p = m.preprocessing;
  p.channels = static_cast<int>(provenance["dims"]["channels"].integer());
  const std::string input = provenance["input"].text();
  static const std::set<std::string> inputs = {"float32", "uint8-nhwc", "uint8-nchw"};
  if (!inputs.count(input)) refuse(provenance.where(), "input '" + input + "' is not known");
  p.normalised = input == "float32";
  p.nhwc = input == "uint8-nhwc";
  const std::vector<std::int64_t> axes = p.nhwc ? std::vector<std::int64_t>{p.height, p.width, p.channels} : std::vector<std::int64_t>{p.channels, p.height, p.width};
  m.input = {"image", p.normalised ? "float32" : "uint8", {batch}};
  m.input.shape.insert(m.input.shape.end(), axes.begin(), axes.end());
  check_preprocessing(p, m.input, provenance.where() + ": preprocess");
  bool classifier = false;
  for (const Field& name : provenance["outputs"].list()) {
    OutputEntry output;
    output.name = name.text();
    output.kind = output.name.substr(0, output.name.find('_'));
    classifier = classifier || output.kind == "logits";
    m.outputs.push_back(output);
  }
  if (m.outputs.empty()) refuse(provenance.where(), "wanted an output");
  m.classes = classifier ? provenance["dims"]["classes"].integer() : 0;
  if (classifier && m.classes < 1) refuse(provenance.where(), "wanted classes of the logits");
  for (const Field& label : provenance["labels"].list()) m.labels.push_back(label.text());
  if (static_cast<std::int64_t>(m.labels.size()) != m.classes) m.labels.clear();  // of another head
  const Field activation = provenance["activation"];
  m.activation = !classifier ? "none" : !activation.is_null() ? activation.text() : m.classes == 1 ? "sigmoid" : "softmax";
  check_activation(m.activation, provenance.where());
  return m;
}

}  // namespace

bool LadderManifest::is_at(const std::string& path) {
  struct stat status {};
  return folder_of(path) != path || ::stat((path + "/" + kName).c_str(), &status) == 0;
}

LadderManifest LadderManifest::read(const std::string& named) {
  LadderManifest m;
  m.folder = folder_of(named);
  const std::string path = plain_file(m.folder, kName, kKind);
  if (size_of(path) > kLargest) refuse(path, "it is too large to be a manifest");
  const Json json = Json::parse(read_file(path), path);
  const Field root(json, path);
  check_format(root);
  m.version = root["version"].text();
  m.weights = file_entry(root["weights"]);
  for (const Field& rung : root["rungs"].list()) {
    m.files.push_back(file_entry(rung["file"]));
    m.rungs.push_back(rung_of(rung));
  }
  if (m.rungs.empty()) refuse(path, "rungs: there are none, wanted one or more");
  std::set<std::string> names = {kName, m.weights.name};
  for (const FileEntry& file : m.files) names.insert(file.name);
  if (names.size() != m.files.size() + 2) refuse(path, "it names a file twice");
  m.runtime = root["runtime"].text();
  m.processor = root["processor"].text();
  const std::int64_t threads = root["threads"].integer();
  if (threads < 0 || threads > kMostThreads) refuse(path, "threads: wanted 0 to " + std::to_string(kMostThreads));
  m.threads = static_cast<int>(threads);
  m.batch = root["batch"].is_null() ? kAny : root["batch"].integer();
  if (!root["batch"].is_null() && m.batch < 1) refuse(path, "batch: wanted 1 or more, or null for any number");
  m.measure = root["measure"].text();
  m.images = root["images"].integer();
  m.file = file_of(root["provenance"], m.batch);
  m.file.folder = m.folder;
  m.file.precision = root["dtype"].text();
  return m;
}

void LadderManifest::check_files(bool hashes) const {
  check_file(folder, weights, kName, kKind, hashes);
  for (const FileEntry& file : files) check_file(folder, file, kName, kKind, hashes);
}

Manifest LadderManifest::of_rung(std::size_t place) const {
  Manifest m = file;
  m.file = files.at(place);
  m.beside = {weights};
  return m;
}

}  // namespace tokexport
