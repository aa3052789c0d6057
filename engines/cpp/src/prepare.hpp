// From a photo to the file's input: resize, crop and normalise as timm does with Pillow.
#pragma once

#include "manifest.hpp"
#include "tokexport/tokexport.hpp"

namespace tokexport {

// Pillow's resize of an 8-bit image. filter: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos".
Image resize(const Image& image, int height, int width, const std::string& filter);

// The part of a photo that the model sees, of the input's size.
Image fit(const Image& image, const Preprocessing& preprocessing);

// Photos as the file takes them.
Tensor prepare(const std::vector<Image>& images, const Preprocessing& preprocessing);

}  // namespace tokexport
