"""Photos as they are: timm's own transforms pixel for pixel, and every kind of file read right or refused."""

import numpy as np
import pytest
from PIL import Image
from tokexport.engines.images import crop, find_images, fit, load_images, normalise, read_image
from tokexport.export.preprocess import INTERPOLATIONS, crop_of, of_transformers, with_stated, words
from tokexport.export.provenance import Preprocess

from tokexport import UsageError

RGB = Preprocess((24, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
GREY = Preprocess((24, 24), (0.5,), (0.25,))


def photo(size=(61, 43), seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_transforms_are_timms_pixel_for_pixel(mode, interpolation):
    from timm.data.transforms_factory import transforms_imagenet_eval

    for size in ((24, 24), (20, 36), (37, 15)):
        for fraction in (1.0, 0.9, 0.875):
            p = Preprocess(size, RGB.mean, RGB.std, interpolation, fraction, mode)
            theirs = transforms_imagenet_eval(size, fraction, mode, interpolation=interpolation, mean=p.mean, std=p.std)
            for photo_size in ((61, 43), (43, 61), (24, 24), (9, 70), (12, 10)):
                image = photo(photo_size)
                pixels = np.asarray(fit(image, p))
                wanted = image
                for step in theirs.transforms[:-2]:
                    wanted = step(wanted)
                assert np.array_equal(pixels, np.asarray(wanted)), (size, fraction, photo_size)
            assert np.allclose(normalise(fit(image, p), p), theirs(image).numpy(), atol=1e-6, rtol=0)


def test_modes_are_read_as_colours_or_grey(tmp_path):
    image = photo()
    saved = {
        "rgb.png": image,
        "cmyk.tif": image.convert("CMYK"),
        "palette.png": image.quantize(200),
        "grey.png": image.convert("L"),
        "one.png": image.convert("1"),
    }
    for name, picture in saved.items():
        picture.save(tmp_path / name)
        read = read_image(tmp_path / name)
        assert read.mode == "RGB" and read.size == image.size
        assert np.array_equal(np.asarray(read), np.asarray(picture.convert("RGB")))
        assert read_image(tmp_path / name, 1).mode == "L"
    assert load_images([tmp_path / "rgb.png"], GREY).shape == (1, 1, 24, 24)
    assert np.allclose(
        normalise(crop(tmp_path / "grey.png", GREY), GREY).mean(), load_images([tmp_path / "grey.png"], GREY).mean()
    )


def test_what_is_transparent_lies_on_white(tmp_path):
    ramp = np.linspace(0, 255, 16 * 16).reshape(16, 16).astype(np.uint8)
    Image.fromarray(np.dstack([ramp] * 3 + [ramp])).save(tmp_path / "alpha.png")
    wanted = ramp.astype(float) * ramp / 255 + 255 - ramp
    assert np.abs(np.asarray(read_image(tmp_path / "alpha.png")).astype(float) - wanted[..., None]).max() <= 1
    clear = Image.fromarray(ramp).convert("P")
    clear.save(tmp_path / "clear.gif", transparency=7)
    assert (np.asarray(read_image(tmp_path / "clear.gif"))[ramp == 7] == 255).all()
    Image.fromarray(np.dstack([ramp, ramp])).save(tmp_path / "la.png")
    assert np.asarray(read_image(tmp_path / "la.png", 1))[0, 0] == 255


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(values).save(tmp_path / name)
        pixels = np.asarray(read_image(tmp_path / name, 1)).astype(float)
        assert np.abs(pixels - values / 257).max() <= 0.5 and len(np.unique(pixels)) > 200


def test_ranges_that_are_not_known_are_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.arange(64).reshape(8, 8).astype(np.int32) * 10**6).save(tmp_path / "int.tif")
    for name in ("float.tif", "int.tif"):
        with pytest.raises(UsageError, match="range that is not known: save it with 8 or 16 bits"):
            read_image(tmp_path / name)


def test_photos_are_upright(tmp_path):
    image, exif = photo((40, 20)), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    read = read_image(tmp_path / "turned.png")
    assert read.size == (20, 40) and np.array_equal(
        np.asarray(read), np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_what_is_cut_short_or_no_image_is_one_error(suffix, tmp_path):
    photo((200, 150)).save(tmp_path / f"a.{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    for n in (0, 4, len(whole) // 2):
        (tmp_path / f"cut.{suffix}").write_bytes(whole[:n])
        with pytest.raises(UsageError, match="cannot be read as an image"):
            crop(tmp_path / f"cut.{suffix}", RGB)
    (tmp_path / f"text.{suffix}").write_text("no image")
    with pytest.raises(UsageError, match="cannot be read as an image"):
        crop(tmp_path / f"text.{suffix}", RGB)


def test_other_numbers_of_channels_are_refused_with_what_to_do(tmp_path):
    photo().save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="takes 4 channels, a photo has 3 or 1: give arrays"):
        load_images([tmp_path / "a.png"], Preprocess((24, 24), (0.5,) * 4, (0.5,) * 4))


def test_folders_are_read_in_order_of_name(tmp_path):
    for name in ("b.png", "a.jpg", "c.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images(tmp_path)] == ["a.jpg", "b.png"]


def test_reading_needs_neither_timm_nor_torch(tmp_path):
    import subprocess
    import sys

    photo().save(tmp_path / "a.png")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'torchvision')));"
        "from tokexport.engines.images import load_images; from tokexport.export.provenance import Preprocess;"
        f"print(load_images([{str(tmp_path / 'a.png')!r}], Preprocess((24, 24), (0.5,) * 3, (0.5,) * 3)).shape)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "(1, 3, 24, 24)", out.stderr


@pytest.mark.parametrize("size, resized", [(224, 257), (224, 256), (7, 8), (384, 384), (30, 97), (518, 589)])
def test_a_crops_fraction_gives_the_pixels_back(size, resized):
    import math

    assert math.floor(size / crop_of(size, resized)) == resized


def test_transformers_preprocessing():
    base = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
    p = of_transformers({**base, "size": {"height": 32, "width": 32}}, (32, 32))
    assert (p.crop, p.crop_mode, p.interpolation, p.mean, p.std) == (1.0, "squash", "bilinear", (0.5,) * 3, (0.25,) * 3)
    p = of_transformers({**base, "size": 256, "crop_size": 224}, (224, 224))
    assert (p.crop, p.crop_mode) == (0.875, "squash")
    p = of_transformers(
        {**base, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, (224, 224)
    )
    assert (p.crop, p.crop_mode) == (0.875, "center")
    p = of_transformers(
        {"do_normalize": False, "size": 32, "rescale_factor": 1 / 127.5, "image_mean": [1] * 3}, (32, 32)
    )
    assert p.mean == (0.0,) * 3 and np.allclose(p.std, 0.5)
    with pytest.raises(UsageError, match="resample 9"):
        of_transformers({**base, "size": 32, "resample": 9}, (32, 32))


@pytest.mark.parametrize(
    "stated, message",
    [
        ({"mean": (0.5, 0.5)}, "mean .*wanted one number or 3"),
        ({"std": 0}, "std .*above 0"),
        ({"std": float("nan")}, "std"),
        ({"interpolation": "cubic"}, "interpolation 'cubic': wanted one of nearest"),
        ({"crop_pct": 1.5}, "crop_pct 1.5"),
        ({"means": 1}, "'means' is unknown"),
    ],
)
def test_what_is_stated_wrongly_is_refused(stated, message):
    with pytest.raises(UsageError, match=message):
        with_stated(RGB, stated)


def test_what_is_stated_stands_in_place_of_the_models_own():
    p = with_stated(RGB, {"mean": 0.5, "std": (1, 2, 3), "interpolation": "lanczos", "crop_pct": 0.8, "size": None})
    assert (p.mean, p.std, p.interpolation, p.crop) == ((0.5,) * 3, (1.0, 2.0, 3.0), "lanczos", 0.8)
    assert words(p) == "24x24, center crop 0.8, lanczos, mean 0.5, std 1 2 3"
    assert words(GREY) == "24x24, in grey, center crop 1, bicubic, mean 0.5, std 0.25"


def test_a_folder_whose_images_lie_deeper_says_where(tmp_path):
    for name in ("0", "1", "2", "3"):
        (tmp_path / name).mkdir()
        photo().save(tmp_path / name / "a.png")
    (tmp_path / "notes").mkdir()
    with pytest.raises(
        UsageError, match=r"no image itself, only in its folders 0, 1, 2, \.\.\.: name those, e\.g\. .*/0$"
    ):
        find_images(tmp_path)
    assert len(find_images([tmp_path / "0", tmp_path / "1"])) == 2
