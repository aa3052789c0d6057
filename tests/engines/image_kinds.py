"""Photos of every kind that people have, written by Pillow or by hand."""

import numpy as np
from PIL import Image, PngImagePlugin


def image_kinds(folder):
    """Some forty photos of all kinds, written to a folder."""
    random = np.random.default_rng(3)

    def photo(w, h, mode="RGB"):
        bands = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "CMYK": 4}[mode]
        small = random.integers(0, 256, (max(h // 6, 2), max(w // 6, 2), bands), dtype=np.uint8)
        image = (
            Image.fromarray(small[..., 0] if bands == 1 else small, mode if mode != "CMYK" else None)
            if mode != "CMYK"
            else Image.frombytes("CMYK", small.shape[1::-1], small.tobytes())
        )
        return image.resize((w, h), Image.Resampling.BICUBIC)

    def save(name, image, **options):
        image.save(folder / name, **options)

    for i, (w, h) in enumerate([(32, 32), (33, 47), (201, 64), (64, 203), (31, 31), (7, 5), (640, 427), (1, 40)]):
        save(f"jpeg_{i}.jpg", photo(w, h), quality=90, subsampling=i % 3)
        save(f"png_{i}.png", photo(w, h))
    for w, h in ((30, 37), (80, 85), (144, 85), (27, 118), (20, 21)):
        save(f"noise_{w}.png", Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)))
    save("progressive.jpg", photo(90, 61), progressive=True)
    save("grey.jpg", photo(77, 50, "L"))
    save("cmyk.jpg", photo(80, 60, "CMYK"))
    save("coarse.jpg", photo(99, 101), quality=5)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        save(f"turned_{turn}.jpg", photo(60, 41), exif=exif)
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.png", photo(50, 33), exif=exif)
    save("alpha.png", photo(50, 61, "RGBA"))
    save("grey_alpha.png", photo(45, 41, "LA"))
    save("grey.png", photo(44, 60, "L"))
    save("palette.png", photo(70, 40).quantize(40))
    save("two_colours.png", photo(70, 40, "L").convert("1"))
    save("palette_clear.png", photo(60, 40).quantize(16), transparency=3)
    save(
        "clear_colour.png",
        Image.fromarray(np.repeat(random.integers(0, 3, (40, 40, 1), dtype=np.uint8), 3, 2)),
        transparency=(1, 1, 1),
    )
    save("few_greys.png", Image.fromarray(random.integers(0, 16, (40, 44), dtype=np.uint8) * 17), bits=4)
    save("deep_grey.png", Image.fromarray(random.integers(0, 65536, (40, 50), dtype=np.uint16)))
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a photo")
    save("text.png", photo(48, 48), pnginfo=info)
    _deep_colour(folder / "deep_colour.png", random.integers(0, 65536, (37, 30, 3), dtype=np.uint16))
    return sorted(folder.iterdir())


def _deep_colour(path, values):
    """An RGB PNG of 16 bits, which Pillow does not write."""
    import struct
    import zlib

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
