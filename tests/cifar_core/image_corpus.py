"""Generated image files: every supported format, mode, orientation and size that the decoder must read."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZES = ((1, 1), (1, 40), (3, 50), (31, 33), (32, 32), (33, 31), (64, 64), (200, 100), (97, 300), (600, 400))
ORIENTATIONS = range(1, 9)


@dataclass(frozen=True)
class CorpusFile:
    """One file: what it shows (`kind`), its extension and its content."""

    kind: str
    extension: str
    content: bytes


def gradient(width: int, height: int) -> Image.Image:
    """Smooth, and different in every corner and colour."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1).astype(np.uint8))


def saved(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    """The image as the content of a file."""
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def half_transparent(width: int, height: int) -> Image.Image:
    """A gradient that fades from opaque to transparent."""
    image = gradient(width, height)
    image.putalpha(Image.fromarray(np.linspace(255, 0, width * height).astype(np.uint8).reshape(height, width)))
    return image


def sixteen_bit(width: int, height: int, channels: int) -> bytes:
    """A PNG file of 16 bits per channel: 1 grey, 2 grey with alpha, 3 RGB, 4 RGBA, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    values = np.linspace(0, 65535, width * height * channels).astype(">u2").reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def corpus() -> list[CorpusFile]:
    """All files, in a fixed order."""
    return [*_sizes(), *_modes(), *_orientations(), *_animations()]


def _sizes() -> Iterator[CorpusFile]:
    for width, height in SIZES:
        image = gradient(width, height)
        yield CorpusFile("RGB", "png", saved(image))
        yield CorpusFile("RGB", "bmp", saved(image, "BMP"))
        yield CorpusFile("RGB lossless", "webp", saved(image, "WEBP", lossless=True))
        yield CorpusFile("RGB lossy", "webp", saved(image, "WEBP", quality=70))
        yield CorpusFile("palette", "gif", saved(image, "GIF"))
        for progressive in (False, True):
            kind = "RGB progressive" if progressive else "RGB baseline"
            yield CorpusFile(kind, "jpg", saved(image, "JPEG", quality=80, progressive=progressive))


def _modes() -> Iterator[CorpusFile]:
    for width, height in ((32, 32), (64, 48), (321, 200)):
        image, faded = gradient(width, height), half_transparent(width, height)
        grey, bits, palette = image.convert("L"), image.convert("1"), image.quantize(64)
        for extension in ("png", "webp"):
            yield CorpusFile("RGBA", extension, saved(faded, extension.upper(), lossless=True))
            yield CorpusFile("opaque RGBA", extension, saved(image.convert("RGBA"), extension.upper(), lossless=True))
        yield CorpusFile("RGBA", "bmp", saved(faded, "BMP"))
        for extension, format_ in (("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("bmp", "BMP"), ("webp", "WEBP")):
            yield CorpusFile("grey", extension, saved(grey, format_))
        for extension in ("png", "gif", "bmp"):
            yield CorpusFile("1 bit", extension, saved(bits, extension.upper()))
            yield CorpusFile("palette", extension, saved(palette, extension.upper()))
        for extension in ("png", "gif"):
            yield CorpusFile("palette with a transparent colour", extension, saved(palette, extension, transparency=3))
        yield CorpusFile("palette with alpha", "png", saved(palette, transparency=bytes(range(0, 256, 4))))
        yield CorpusFile("RGB with a transparent colour", "png", saved(image, transparency=image.getpixel((0, 0))))
        yield CorpusFile("grey with a transparent value", "png", saved(grey, transparency=grey.getpixel((0, 0))))
        yield CorpusFile("grey with alpha", "png", saved(faded.convert("LA")))
        for channels, kind in enumerate(("grey", "grey with alpha", "RGB", "RGBA"), start=1):
            yield CorpusFile(f"16-bit {kind}", "png", sixteen_bit(width, height, channels))
        for progressive in (False, True):
            kind = "CMYK progressive" if progressive else "CMYK"
            yield CorpusFile(kind, "jpeg", saved(image.convert("CMYK"), "JPEG", progressive=progressive))


def _orientations() -> Iterator[CorpusFile]:
    for orientation in ORIENTATIONS:
        exif = Image.Exif()
        exif[0x0112] = orientation
        kind = f"EXIF orientation {orientation}"
        for width, height in ((32, 32), (96, 64), (300, 451)):
            for extension, format_ in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
                yield CorpusFile(kind, extension, saved(gradient(width, height), format_, exif=exif))
        yield CorpusFile(f"{kind}, RGBA", "png", saved(half_transparent(96, 64), exif=exif))


def _animations() -> Iterator[CorpusFile]:
    for width, height in ((32, 32), (200, 130)):
        frames = [gradient(width, height).rotate(angle) for angle in (0, 90, 180)]
        for extension in ("gif", "webp", "png"):
            content = saved(frames[0], extension.upper(), save_all=True, append_images=frames[1:], duration=100)
            yield CorpusFile("animation", extension, content)
        content = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
        yield CorpusFile("several pictures (MPO)", "jpg", content)


def lossless_jpeg(width: int, height: int) -> bytes:
    """A grey lossless JPEG file, which Pillow cannot write: every pixel is 128, as predicted."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(content)) + content

    table = segment(0xC4, bytes((0, 1, 1, *[0] * 14, 0, 4)))  # the code 0: the difference is 0
    frame = segment(0xC3, struct.pack(">BHHB", 8, height, width, 1) + bytes((1, 0x11, 0)))
    scan = segment(0xDA, bytes((1, 1, 0, 1, 0, 0)))
    return b"\xff\xd8" + table + frame + scan + bytes((width * height + 7) // 8) + b"\xff\xd9"
