#include "proof.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "files.hpp"
#include "prepare.hpp"
#include "safetensors.hpp"

namespace tokexport {
namespace {

constexpr double kPixel = 1.001;  // the most a preprocessed photo may differ, in 255ths
constexpr double kInfinite = std::numeric_limits<double>::infinity();
constexpr std::int64_t kDropped = -1, kGone = -2;

using Rows = std::vector<std::int64_t>;

// What becomes of the rows of one step, of one image: host is the row itself, its host's, n_in for the fused row, or kDropped.
struct Fates {
  Rows keep, host;
};

[[noreturn]] void no_decision(const Decision& step, const char* what) {
  throw Error(Fault::failure, "block " + std::to_string(step.block) + ": the decisions of the file are none (" + what + ")");
}

Rows row_of(const Tensor& tensor, std::size_t image, std::size_t images) {
  const auto& values = tensor.indices();
  std::size_t n = values.size() / images;
  return Rows(values.begin() + image * n, values.begin() + (image + 1) * n);
}

Fates read_fates(const Tensors& values, const Decision& step, std::size_t image, std::size_t images) {
  auto part = [&](const char* name) { return step.parts.count(name) ? row_of(values.at(step.parts.at(name)), image, images) : Rows{}; };
  Rows order = part("order");
  if (order.empty()) {
    order = part("keep");
    Rows src = part("src");
    order.insert(order.end(), src.begin(), src.end());
  }
  std::vector<bool> used(step.n_in, false);
  if (static_cast<std::int64_t>(order.size()) != step.n_kept + step.n_folded) no_decision(step, "another number of rows");
  for (std::int64_t row : order) {
    if (row < 0 || row >= step.n_in || used[row]) no_decision(step, "a row stays twice, or is not there");
    used[row] = true;
  }
  Fates fates{Rows(order.begin(), order.begin() + step.n_kept), Rows(step.n_in, kDropped)};
  for (std::int64_t row : fates.keep) fates.host[row] = row;
  Rows dst = part("dst"), target = part("target");
  for (std::int64_t i = 0; i < step.n_folded; ++i) {
    std::int64_t row = order[step.n_kept + i];
    if (step.n_out > step.n_kept) {
      fates.host[row] = step.n_in;
      continue;
    }
    std::int64_t label = dst.empty() ? target.at(row) : dst.at(i);
    auto hit = std::find(step.row_labels.begin(), step.row_labels.end(), label);
    if (hit == step.row_labels.end()) no_decision(step, "a row is folded into one that does not stay");
    fates.host[row] = fates.keep[hit - step.row_labels.begin()];
  }
  return fates;
}

// Token -> the token it ends in; kGone for tokens that are not there any more.
Rows by_token(const Fates& fates, const Rows& ids, std::int64_t fused) {
  Rows tokens(fused + 1, kGone);
  for (std::size_t row = 0; row < ids.size(); ++row) {
    std::int64_t host = fates.host[row];
    tokens[ids[row]] = host == kDropped ? kDropped : host == static_cast<std::int64_t>(ids.size()) ? fused : ids.at(host);
  }
  return tokens;
}

Rows tokens_of(const Rows& rows, const Rows& ids) {
  Rows tokens;
  for (std::int64_t row : rows) tokens.push_back(ids.at(row));
  return tokens;
}

struct Difference {
  int block = -1;
  double margin = 0, limit = 0;
  bool reordered = false;
  bool explained() const { return margin <= limit; }
};

// What speaks against the other fate of a token; 0 where it only follows from that of its host.
double margin_of(std::int64_t token, const Rows& fates, const Rows& now, float fate, float host) {
  auto kind = [&](std::int64_t f) { return f == token ? std::int64_t(0) : f >= 0 ? std::int64_t(1) : f; };
  if (kind(fates[token]) != kind(now[token]) || kind(now[token]) == 0) return fate;
  auto stays = [&](std::int64_t t) { return fates[t] == t && now[t] == t; };
  return stays(fates[token]) && stays(now[token]) ? host : 0;
}

Difference compare(const Manifest& m, const Tensors& proof, const Tensors& values, std::size_t image) {
  const std::size_t images = static_cast<std::size_t>(m.proof_images);
  Rows ids(m.tokens), ids_now;
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int64_t>(i);
  ids_now = ids;
  Difference difference;
  for (std::size_t k = 0; k < m.decisions.size(); ++k) {
    const Decision& step = m.decisions[k];
    const std::string block = ".block" + std::to_string(step.block);
    if (static_cast<std::int64_t>(ids.size()) != step.n_in) throw Error(Fault::usage, "block " + std::to_string(step.block) + ": other tokens than are left: the manifest was changed");
    Fates then{row_of(proof.at("keep" + block), image, images), row_of(proof.at("host" + block), image, images)};
    for (std::int64_t row : then.keep) if (row < 0 || row >= step.n_in) no_decision(step, "in the proof");
    for (std::int64_t row : then.host) if (row < kDropped || row > step.n_in) no_decision(step, "in the proof");
    Fates now = read_fates(values, step, image, images);
    const std::int64_t fused = m.tokens + static_cast<std::int64_t>(k);
    Rows fates = by_token(then, ids, fused), fates_now = by_token(now, ids_now, fused);
    Rows kept = tokens_of(then.keep, ids), kept_now = tokens_of(now.keep, ids_now), differ;
    for (std::size_t t = 0; t < fates.size(); ++t)
      if (fates[t] != fates_now[t]) differ.push_back(static_cast<std::int64_t>(t));
    if (differ.empty() && m.ordered)
      for (std::size_t i = 0; i < kept.size(); ++i)
        if (kept[i] != kept_now[i]) differ.push_back(kept[i]);
    if (!differ.empty()) {
      const auto& margins = proof.at("margin" + block).floats();
      for (std::int64_t token : differ) {
        std::size_t row = static_cast<std::size_t>(std::find(ids.begin(), ids.end(), token) - ids.begin()), n = static_cast<std::size_t>(step.n_in);
        double margin = margin_of(token, fates, fates_now, margins[image * n + row], margins[(images + image) * n + row]);
        difference.margin = std::isnan(margin) ? kInfinite : std::max(difference.margin, margin);
      }
      difference.block = step.block;
      difference.limit = step.near_tie;
      return difference;
    }
    difference.reordered = difference.reordered || kept != kept_now;
    if (step.n_out > step.n_kept) {
      kept.push_back(fused);
      kept_now.push_back(fused);
    }
    ids = std::move(kept);
    ids_now = std::move(kept_now);
  }
  return difference;
}

// Largest difference of one image over its scale, or the share of wrong entries; infinite for what is not finite.
double error_of(const OutputEntry& output, const Tensor& value, const Tensor& wanted, double scale, std::size_t image, std::size_t images) {
  if (value.size() != wanted.size() || value.shape != wanted.shape) return kInfinite;
  const std::size_t n = wanted.size() / images;
  double worst = 0;
  for (std::size_t i = image * n; i < (image + 1) * n; ++i) {
    if (output.exact) {
      worst += value.indices()[i] != wanted.indices()[i];
      continue;
    }
    double a = value.floats()[i], b = wanted.floats()[i];
    if (!std::isfinite(a) || !std::isfinite(b) || !std::isfinite(scale)) return kInfinite;
    worst = std::max(worst, std::abs(a - b));
  }
  return output.exact ? worst / n : worst / std::max(scale, 1e-30);
}

// Largest difference between the stored input and what is made of the photo here, in 255ths.
double pixels_of(const Manifest& m, const Tensors& proof, std::size_t image) {
  const Tensor& photo = proof.at("photo." + std::to_string(image));
  Image pixels{static_cast<int>(photo.shape[0]), static_cast<int>(photo.shape[1]), static_cast<int>(photo.shape[2]), std::get<std::vector<std::uint8_t>>(photo.values)};
  Tensor made = prepare({pixels}, m.preprocessing);
  const Tensor& input = proof.at("input");
  const std::size_t n = made.size(), plane = std::size_t(m.preprocessing.height) * m.preprocessing.width;
  double worst = 0;
  for (std::size_t i = 0; i < n; ++i) {
    double difference;
    if (m.preprocessing.normalised)
      difference = std::abs(double(made.floats()[i]) - input.floats()[image * n + i]) * 255 * std::abs(m.preprocessing.std[i / plane]);
    else
      difference = std::abs(double(std::get<2>(made.values)[i]) - std::get<2>(input.values)[image * n + i]);
    worst = std::isnan(difference) ? kInfinite : std::max(worst, difference);
  }
  return worst;
}

}  // namespace

Tensors read_proof(const Manifest& m) {
  std::string path = plain_file(m.folder, m.proof.name);
  Tensors tensors = read_safetensors(path);
  const std::int64_t n = m.proof_images;
  auto check = [&](const std::string& name, std::vector<std::int64_t> shape, std::size_t kind) {
    auto found = tensors.find(name);
    bool fits = found != tensors.end() && found->second.values.index() == kind && found->second.shape.size() == shape.size();
    for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == kAny ? found->second.shape[i] > 0 : found->second.shape[i] == shape[i];
    if (!fits) throw Error(Fault::usage, path + ": " + name + " is missing or of another shape: the proof is not of this manifest");
  };
  auto with_batch = [&](std::vector<std::int64_t> shape) { shape[0] = n; return shape; };
  check("input", with_batch(m.input.shape), m.preprocessing.normalised ? 0 : 2);
  for (const OutputEntry& o : m.outputs) {
    for (const char* side : {"reference.", "own."}) check(side + o.name, with_batch(o.shape), o.exact ? 1 : 0);
    check("scale." + o.name, {n}, 0);
  }
  for (const Decision& d : m.decisions) {
    std::string block = ".block" + std::to_string(d.block);
    check("keep" + block, {n, d.n_kept}, 1);
    check("host" + block, {n, d.n_in}, 1);
    check("margin" + block, {2, n, d.n_in}, 0);
  }
  for (std::int64_t i = 0; m.photos && i < n; ++i) check("photo." + std::to_string(i), {kAny, kAny, m.preprocessing.channels}, 2);
  return tensors;
}

Proof judge(const Manifest& m, const Tensors& proof, const Tensors& values) {
  const std::size_t images = static_cast<std::size_t>(m.proof_images);
  Proof result;
  result.decisions = !m.decisions.empty() || !m.reduces;
  std::vector<bool> alike, in_order, failed;
  for (std::size_t i = 0; i < images; ++i) {
    Difference d = compare(m, proof, values, i);
    Proof::Photo photo;
    photo.pixels = m.photos ? pixels_of(m, proof, i) : -1;
    photo.block = d.block;
    photo.margin = d.margin;
    photo.limit = d.limit;
    alike.push_back(d.block < 0);
    in_order.push_back(d.block < 0 && !d.reordered);
    failed.push_back(!(photo.pixels <= kPixel) || (d.block >= 0 && !d.explained()));
    result.images.push_back(photo);
  }
  for (const OutputEntry& o : m.outputs) {
    Proof::Output row;
    row.name = o.name;
    row.limit = o.limit;
    row.own_limit = o.own_limit;
    for (std::size_t i = 0; i < images; ++i) {
      if (!(o.by_row ? in_order : alike)[i]) continue;
      double scale = proof.at("scale." + o.name).floats()[i];
      double error = error_of(o, values.at(o.name), proof.at("reference." + o.name), scale, i, images);
      double own = error_of(o, values.at(o.name), proof.at("own." + o.name), scale, i, images);
      failed[i] = failed[i] || !(error <= o.limit && own <= o.own_limit);
      row.error = std::max(row.error, error);
      row.own_error = std::max(row.own_error, own);
      ++row.n_judged;
    }
    result.outputs.push_back(row);
  }
  for (std::size_t i = 0; i < images; ++i) result.images[i].verdict = failed[i] ? "failed" : alike[i] ? "equal" : "flipped";
  return result;
}

bool Proof::passed() const {
  bool judged = false;
  for (const Photo& image : images) {
    if (image.verdict == "failed") return false;
    judged = judged || image.verdict == "equal";
  }
  return judged && faults.empty();
}

std::string Proof::summary() const {
  int flipped = 0, bad = 0;
  double worst = 0;
  for (const Photo& image : images) flipped += image.verdict == "flipped", bad += image.verdict == "failed";
  for (const Output& output : outputs)
    if (output.limit > 0) worst = std::max(worst, output.error);
  char figure[32];
  std::snprintf(figure, sizeof figure, "%.1e", worst);
  std::string text = (passed() ? "passed, " : "FAILED, ") + std::to_string(images.size()) + " images, max relative difference " + figure;
  if (flipped) text += ", " + std::to_string(flipped) + " flipped near-ties";
  if (bad) text += ", " + std::to_string(bad) + " failed";
  if (flipped && flipped == static_cast<int>(images.size())) text += ", no image could be judged: every one has a near-tie that this runtime decides otherwise";
  if (!decisions) text += ", the file gives no decisions, so it is judged by its outputs";
  for (const std::string& fault : faults) text += ", " + fault;
  return text;
}

}  // namespace tokexport
