"""Image files become pixels: every format, no silent truncation, broken images are named before the run."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.data import bit_depth
from diffusers_ddpm_ext.training.data.array_images import UnreadableImage
from diffusers_ddpm_ext.training.data.decoding import Preprocessing, decode_image
from diffusers_ddpm_ext.training.data.image_store import LazyImages, PackedImages, check_same_kind, decode_source
from diffusers_ddpm_ext.utils.pixel_format import PixelFormat

RNG = np.random.default_rng(0)
NOISE = {channels: RNG.integers(0, 256, (20, 30, channels), dtype=np.uint8) for channels in (1, 3, 4)}
AS_IS = Preprocessing((20, 30))


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def color(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(NOISE[3]).convert(mode)


def pixels(payload: bytes, **options) -> np.ndarray:
    return decode_image(payload, Preprocessing((20, 30), **options)).pixels


@dataclass(frozen=True)
class BytesSource:
    """Images as bytes in memory."""

    names: list[str]
    payloads: list[bytes | None]
    option: str = "--train_data_dir 'photos'"

    def payload(self, index):
        return self.payloads[index]


def load(payloads, preprocessing=AS_IS, **options):
    source = BytesSource([f"{index}.png" for index in range(len(payloads))], list(payloads))
    return decode_source(source, preprocessing, **({"skip_bad": False, "memory_limit": 10**9} | options))


# ---------------------------------------------------------------- formats and channels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "WEBP", "QOI", "ICO"])
def test_lossless_formats_give_exact_pixels(kind):
    options = {"WEBP": {"lossless": True}, "ICO": {"sizes": [(30, 20)]}}.get(kind, {})
    image = color("RGBA") if kind == "ICO" else color()
    decoded_pixels = pixels(encode(image, kind, **options), channels=3)
    np.testing.assert_array_equal(decoded_pixels.transpose(1, 2, 0), NOISE[3])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "JPEG2000", "AVIF"])
def test_lossy_formats_give_similar_pixels(kind):
    smooth = np.stack([np.linspace(0, 255, 30)[None].repeat(20, 0)] * 3, -1).astype(np.uint8)
    decoded_pixels = pixels(encode(Image.fromarray(smooth), kind))
    assert decoded_pixels.shape == (3, 20, 30)
    assert np.abs(decoded_pixels.transpose(1, 2, 0).astype(int) - smooth).mean() < 4


@pytest.mark.parametrize(
    ("mode", "kind", "channels"),
    [
        ("1", "PNG", 1),
        ("L", "PNG", 1),
        ("LA", "PNG", 4),
        ("P", "PNG", 3),
        ("RGB", "PNG", 3),
        ("RGBA", "PNG", 4),
        ("CMYK", "TIFF", 3),
        ("CMYK", "JPEG", 3),
        ("YCbCr", "TIFF", 3),
        ("L", "JPEG", 1),
    ],
)
def test_channels_follow_the_image(mode, kind, channels):
    assert pixels(encode(color(mode), kind)).shape == (channels, 20, 30)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("mode", "kind"), [("1", "PNG"), ("L", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("CMYK", "JPEG")]
)
def test_channels_can_be_chosen(mode, kind, channels):
    assert pixels(encode(color(mode), kind), channels=channels).shape == (channels, 20, 30)


def test_palette_colors_are_looked_up():
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    decoded_pixels = decode_image(encode(palette, "PNG"), Preprocessing((1, 2))).pixels
    assert decoded_pixels[:, 0].T.tolist() == [[10, 20, 30], [200, 100, 50]]
    gray = decode_image(encode(palette, "PNG"), Preprocessing((1, 2), channels=1)).pixels
    assert gray[0, 0].tolist() == [
        round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in [(10, 20, 30), (200, 100, 50)]
    ]


def test_one_bit_is_black_and_white():
    assert set(np.unique(pixels(encode(color("1"), "PNG")))) == {0, 255}


def test_dropped_transparency_becomes_white():
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    half = Image.new("RGBA", (30, 20), (0, 0, 0, 128))
    assert (pixels(encode(clear, "PNG"), channels=3) == 255).all()
    assert np.unique(pixels(encode(half, "PNG"), channels=1)).tolist() == [127]
    kept = pixels(encode(clear, "PNG"))
    assert kept.shape[0] == 4
    assert (kept[3] == 0).all()


def test_a_transparent_palette_has_four_channels_only_where_it_is_used():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    used, unused = (encode(image, "PNG", transparency=which) for which in (0, 2))
    assert [decode_image(p, Preprocessing((1, 2))).kind[0] for p in (used, unused)] == [4, 3]


def test_photographs_are_turned_upright():
    """A rotated camera stores the image sideways, and the rotation in EXIF tag 274: 6 is a quarter turn clockwise."""
    exif = Image.Exif()
    exif[274] = 6
    sideways = Image.fromarray(np.rot90(NOISE[3], 1).copy())
    for kind in ("PNG", "TIFF"):
        decoded_pixels = pixels(encode(sideways, kind, exif=exif))
        np.testing.assert_array_equal(decoded_pixels.transpose(1, 2, 0), NOISE[3])


def test_the_first_frame_of_an_animation_is_used():
    frames = [Image.new("RGB", (30, 20), (value, 0, 0)) for value in (255, 0)]
    decoded_pixels = pixels(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (decoded_pixels[0] == 255).all()


# ---------------------------------------------------------------- more than 8 bits


NOISE_16_BIT = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)


def png16(color_type: int) -> bytes:
    """A 16-bit PNG, written by hand: Pillow cannot write 16-bit color."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    values = np.repeat(NOISE_16_BIT[..., None], channels, -1).astype(">u2")

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 30, 20, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg2000(bits: int) -> bytes:
    """An 8-bit JPEG 2000 image whose header has another depth (SIZ segment of ISO 15444-1, A.5.1)."""
    data = bytearray(encode(color(), "JPEG2000"))
    siz = data.index(b"\xff\x51")
    data[siz + 2 + 38] = bits - 1
    return bytes(data)


def tiff16(order: str, photometric: int) -> bytes:
    """A 16-bit TIFF, written by hand (TIFF 6.0, sections 2 and 6).

    Args:
        order: of the bytes, "<" or ">".
        photometric: 0 white is zero, 1 black is zero, 2 color.
    """
    count = 3 if photometric == 2 else 1
    values = np.repeat(NOISE_16_BIT[..., None], count, -1)
    body = (65535 - values if photometric == 0 else values).astype(f"{order}u2").tobytes()
    depth = 8 if count == 3 else 16  # the depths' offset, or the depth itself
    tags = [(256, 3, 1, 30), (257, 3, 1, 20), (258, 3, count, depth), (259, 3, 1, 1), (262, 3, 1, photometric)]
    tags += [(273, 4, 1, 14), (277, 3, 1, count), (278, 3, 1, 20), (279, 4, 1, len(body))]
    entries = [
        struct.pack(f"{order}HHIHH", tag, kind, n, value, 0) if kind == 3 and n == 1
        else struct.pack(f"{order}HHII", tag, kind, n, value)
        for tag, kind, n, value in tags
    ]  # fmt: skip
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(entries) + b"\0" * 4
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 14 + len(body))
    return head + struct.pack(f"{order}HHH", 16, 16, 16) + body + directory


UNSUPPORTED = {
    "32-bit TIFF": encode(Image.fromarray(RNG.integers(0, 70000, (20, 30)).astype(np.int32)), "TIFF"),
    "color PPM": b"P6\n30 20\n65535\n" + RNG.integers(0, 256, 3600, dtype=np.uint8).tobytes(),
    "12-bit PGM": b"P5\n30 20\n4095\n" + RNG.integers(0, 16, 1200, dtype=np.uint8).tobytes(),
    "JPEG 2000": jpeg2000(12),
}


def gray_16_bit(image_format: str = "PNG", **options) -> bytes:
    return encode(Image.fromarray(NOISE_16_BIT), image_format, **options)


GRAY_16_BIT = {
    "PNG by hand": png16(0),
    "PNG": gray_16_bit(),
    "TIFF": gray_16_bit("TIFF"),
    "little-endian TIFF": tiff16("<", 1),
    "big-endian TIFF": tiff16(">", 1),
    "TIFF with white as zero": tiff16("<", 0),
    "TIFF with LZW": gray_16_bit("TIFF", compression="tiff_lzw"),
    "PGM": b"P5\n30 20\n65535\n" + NOISE_16_BIT.astype(">u2").tobytes(),
    "JPEG 2000": gray_16_bit("JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("name", GRAY_16_BIT)
def test_one_channel_of_16_bits_is_not_truncated(name):
    decoded = decode_image(GRAY_16_BIT[name], AS_IS)
    assert decoded.kind == (1, "uint16")
    np.testing.assert_array_equal(decoded.pixels[0], NOISE_16_BIT)


@pytest.mark.parametrize(("channels", "opaque"), [(1, []), (3, []), (4, [65535])])
def test_16_bits_become_color_on_request(channels, opaque):
    values = pixels(gray_16_bit(), channels=channels)
    assert values.shape == (channels, 20, 30)
    for plane in values[:3]:
        np.testing.assert_array_equal(plane, NOISE_16_BIT)
    assert (values[3:] == 65535).all()
    assert len(values[3:]) == len(opaque)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_turned_upright(kind):
    exif = Image.Exif()
    exif[274] = 6
    sideways = encode(Image.fromarray(np.rot90(NOISE_16_BIT, 1).copy()), kind, exif=exif)
    np.testing.assert_array_equal(pixels(sideways)[0], NOISE_16_BIT)


@pytest.mark.parametrize("size", [(20, 30), (16, 16), (7, 9), (33, 40)])
@pytest.mark.parametrize("center_crop", [False, True])
def test_16_bits_are_resized_like_8_bits(size, center_crop):
    """Level v of 8 bits and level 257 v of 16 bits are the same value; 8 bits are rounded to half a level."""
    values = RNG.integers(0, 256, (28, 45), dtype=np.uint8)
    preprocessing = Preprocessing(size, center_crop=center_crop)
    eight = decode_image(encode(Image.fromarray(values), "PNG"), preprocessing)
    sixteen = decode_image(encode(Image.fromarray(values.astype(np.uint16) * 257), "PNG"), preprocessing)
    assert sixteen.pixels.shape == eight.pixels.shape
    assert sixteen.enlarged == eight.enlarged
    assert np.abs(sixteen.pixels / 257 - eight.pixels).max() < 1.1
    assert np.abs(sixteen.pixels / 257 - eight.pixels).mean() < 0.5


def test_mixed_depths_are_refused():
    with pytest.raises(ConfigError, match=r"'0.png' is uint8, '1.png' is uint16; convert"):
        load([encode(color("L"), "PNG"), gray_16_bit()])
    loaded = load([gray_16_bit(), gray_16_bit()])
    assert (loaded.images.pixel_format.num_levels, loaded.highest) == (65536, NOISE_16_BIT.max())
    with pytest.raises(ConfigError, match="differ in depth"):
        check_same_kind(loaded, load([encode(color("L"), "PNG")]))


def test_16_bits_are_the_same_from_memory_and_from_files():
    payloads = [encode(Image.fromarray(np.roll(NOISE_16_BIT, i)), "PNG") for i in range(3)]
    packed, lazy = load(payloads), load(payloads, memory_limit=0)
    assert isinstance(lazy.images, LazyImages)
    assert packed.fingerprint == lazy.fingerprint
    for index in range(3):
        assert torch.equal(packed.images.image(index), lazy.images.image(index))
    assert packed.images.stack.dtype == torch.uint16
    assert lazy.images.pixel_format == packed.images.pixel_format == PixelFormat("uint16", 0, 65535)


@pytest.mark.parametrize("other", [encode(color("L"), "PNG"), encode(color(), "PNG")])
def test_an_image_that_becomes_another_kind_is_named(other):
    """Without an error, 8 bits among 16 would be almost black."""
    source = BytesSource(["a.png", "b.png"], [gray_16_bit(), gray_16_bit()])
    loaded = decode_source(source, AS_IS, skip_bad=False, memory_limit=0)
    source.payloads[1] = other
    with pytest.raises(
        RunError, match=r"'b.png' of .* became another kind of image: it is .*, not grayscale \(1, uint16"
    ):
        loaded.images.image(1)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_values_are_refused_and_never_truncated(name):
    with pytest.raises(ConfigError, match=r"convert it to PNG|give their range by --data_range") as caught:
        load([encode(color(), "PNG"), UNSUPPORTED[name]], skip_bad=True)
    message = str(caught.value)
    assert "'1.png'" in message
    assert "\n" not in message


@pytest.mark.parametrize(("flags", "bits"), [(0x0C, 8), (0x4C, 10), (0x6C, 12)])
def test_the_depth_of_avif_is_read_from_its_header(flags, bits):
    """Pillow writes 8 bits only, and its decoder refuses a wrong header, so the header is read by itself.

    The flags are the third byte of the box ``av1C`` (AV1 in ISO base media files, section 2.3.3).
    """
    data = encode(color(), "AVIF")
    place = data.index(b"av1C") + 6
    assert data[place] == 0x0C
    assert bit_depth._depth_in_header("AVIF", data[:place] + bytes([flags]) + data[place + 1 :]) == bits


@pytest.mark.parametrize("header", [b"P6\n30 20\n255\n", b"P6\n30 20\n100\n"])
def test_8_bits_and_fewer_are_accepted(header):
    assert pixels(header + bytes(1800)).shape == (3, 20, 30)


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("original", [(40, 60), (100, 40), (10, 15), (21, 33), (7, 500)])
@pytest.mark.parametrize("size", [(20, 30), (16, 16), (32, 8)])
@pytest.mark.parametrize("center_crop", [False, True])
def test_the_image_just_covers_the_size(original, size, center_crop):
    image = Image.new("L", original[::-1], 200)
    decoded = decode_image(encode(image, "PNG"), Preprocessing(size, center_crop=center_crop))
    height, width = decoded.pixels.shape[1:]
    assert (decoded.pixels == 200).all()
    assert decoded.enlarged == (original[0] < size[0] or original[1] < size[1])
    if center_crop:
        assert (height, width) == size
        return
    assert height == size[0] or width == size[1]
    assert height >= size[0]
    assert width >= size[1]
    scale = max(size[0] / original[0], size[1] / original[1])
    assert abs(height - scale * original[0]) < 1
    assert abs(width - scale * original[1]) < 1


def test_the_center_is_cropped_and_shrinking_is_antialiased():
    stripes = np.zeros((20, 90), dtype=np.uint8)
    stripes[:, 30:60:2] = 255  # the middle third: thin lines
    image = Image.fromarray(stripes).resize((360, 80), Image.Resampling.NEAREST)
    center = pixels(encode(image, "PNG"), center_crop=True)[0].astype(float)
    assert center.shape == (20, 30)
    assert np.abs(center[:, 1:-1:2] - center[:, 2::2]).mean() > 100
    fine = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (80, 240)))
    assert np.abs(pixels(encode(fine, "PNG"), center_crop=True).astype(float) - 127.5).max() < 12


# ---------------------------------------------------------------- loading all images


def broken() -> dict[str, bytes | None]:
    intact = {kind: encode(color(), kind) for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")}
    halves = {f"half a {kind}": data[: len(data) // 2] for kind, data in intact.items()}
    damaged = bytearray(intact["PNG"])
    damaged[len(damaged) // 2] ^= 255
    return halves | {
        "nothing": b"",
        "no bytes": None,
        "text": b"not an image at all",
        "a flipped byte": bytes(damaged),
        "a header": intact["JPEG"][:20],
    }


@pytest.mark.parametrize("name", broken())
def test_broken_images_are_named_before_the_run(name):
    good = encode(color(), "PNG")
    payloads = [good, broken()[name], good]
    with pytest.raises(ConfigError, match=r"--train_data_dir 'photos': 1 of 3 images cannot be read") as caught:
        load(payloads)
    assert "'1.png'" in str(caught.value)
    assert "--skip_bad_images" in str(caught.value)
    assert "\n" not in str(caught.value)
    loaded = load(payloads, skip_bad=True)
    assert (len(loaded.images), loaded.skipped) == (2, 1)
    assert list(loaded.names) == ["0.png", "2.png"]


def test_only_broken_images_are_refused():
    with pytest.raises(ConfigError, match="no image is left, 2 of 2"):
        load([b"", b"x"], skip_bad=True)


def test_the_first_of_several_is_named():
    with pytest.raises(ConfigError, match=r"2 of 3 images cannot be read: the first is '0.png'"):
        load([b"", encode(color(), "PNG"), b"x"])


def test_mixed_channels_name_two_images_and_the_option():
    payloads = [encode(color(), "PNG"), encode(color(), "PNG"), encode(color("L"), "PNG")]
    with pytest.raises(ConfigError, match=r"'0.png' is color \(3\), '2.png' is grayscale \(1\); --channels"):
        load(payloads)
    for channels in (1, 3, 4):
        assert load(payloads, Preprocessing((20, 30), channels)).images.channels == channels


@pytest.mark.parametrize("center_crop", [False, True])
def test_memory_and_file_give_the_same_pixels(center_crop):
    payloads = [encode(color().resize((30 + 7 * i, 50 - 3 * i)), "PNG") for i in range(7)]
    preprocessing = Preprocessing((20, 30), center_crop=center_crop)
    packed = load(payloads, preprocessing)
    lazy = load(payloads, preprocessing, memory_limit=5000)
    assert isinstance(packed.images, PackedImages)
    assert isinstance(lazy.images, LazyImages)
    assert packed.fingerprint == lazy.fingerprint
    assert len(packed.images) == len(lazy.images) == 7
    for index in range(7):
        assert torch.equal(packed.images.image(index), lazy.images.image(index))
    assert (packed.images.stack is not None) == center_crop


def test_an_image_that_breaks_later_is_named():
    payloads = [encode(color(), "PNG")] * 3
    source = BytesSource(["a.png", "b.png", "c.png"], payloads)
    loaded = decode_source(source, AS_IS, skip_bad=False, memory_limit=0)
    source.payloads[1] = b""
    assert loaded.images.image(2).shape == (3, 20, 30)
    with pytest.raises(RunError, match=r"'b.png' of --train_data_dir 'photos' became unreadable"):
        loaded.images.image(1)


def test_the_fingerprint_sees_a_pixel_a_name_and_the_order():
    one, other = encode(color(), "PNG"), encode(color().rotate(180), "PNG")
    base = load([one, other]).fingerprint
    assert load([one, other]).fingerprint == base
    assert load([other, one]).fingerprint != base
    assert load([one, one]).fingerprint != base
    renamed = BytesSource(["0.png", "x.png"], [one, other])
    assert decode_source(renamed, AS_IS, skip_bad=False, memory_limit=10**9).fingerprint != base


def test_very_large_images_are_read_without_a_warning():
    """Pillow warns of more than 89 million pixels; under -W error that would be an unreadable image."""
    large = encode(Image.new("1", (9600, 9600)), "PNG")
    assert load([large]).images.channels == 1


def test_a_missing_payload_is_unreadable():
    with pytest.raises(UnreadableImage, match="empty"):
        decode_image(None, AS_IS)


def test_libraries_print_nothing_about_a_damaged_tiff(tmp_path, capfd):
    """The reason is in the error of the run: libtiff and Pillow would also print it, a line for each file."""
    image = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20))
    image.save(tmp_path / "a.tif", compression="tiff_adobe_deflate")
    content = (tmp_path / "a.tif").read_bytes()
    start = 8 if content[8:10] == b"\x78\x9c" else content.find(b"\x78")
    (tmp_path / "a.tif").write_bytes(content[: start + 4] + bytes(30) + content[start + 34 :])
    with pytest.raises(UnreadableImage):
        decode_image(tmp_path / "a.tif", Preprocessing((8, 8), None, True))
    assert capfd.readouterr() == ("", "")
