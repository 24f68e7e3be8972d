"""Files become pixels: every kind of image, nothing cut in silence, what is broken named before the run."""

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
from diffusers_ddpm_ext.training.data import bit_depth as depth
from diffusers_ddpm_ext.training.data.decoding import BadImage, Preparation, read_picture
from diffusers_ddpm_ext.training.data.image_store import LazyImages, PackedImages, check_alike, read

RNG = np.random.default_rng(0)
NOISE = {channels: RNG.integers(0, 256, (20, 30, channels), dtype=np.uint8) for channels in (1, 3, 4)}
AS_IS = Preparation((20, 30))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colour(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(NOISE[3]).convert(mode)


def pixels(payload: bytes, **options) -> np.ndarray:
    return read_picture(payload, Preparation((20, 30), **options)).pixels


@dataclass(frozen=True)
class Given:
    """Images as bytes."""

    names: list[str]
    payloads: list[bytes | None]
    option: str = "--train_data_dir 'photos'"

    def payload(self, index):
        return self.payloads[index]


def read_given(payloads, preparation=AS_IS, **options):
    given = Given([f"{index}.png" for index in range(len(payloads))], list(payloads))
    return read(given, preparation, **({"skip_bad": False, "memory_limit": 10**9} | options))


# ---------------------------------------------------------------- kinds of images


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "WEBP", "QOI", "ICO"])
def test_lossless_kinds_give_their_pixels(kind):
    options = {"WEBP": {"lossless": True}, "ICO": {"sizes": [(30, 20)]}}.get(kind, {})
    image = colour("RGBA") if kind == "ICO" else colour()
    read_back = pixels(encode(image, kind, **options), channels=3)
    np.testing.assert_array_equal(read_back.transpose(1, 2, 0), NOISE[3])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "JPEG2000", "AVIF"])
def test_lossy_kinds_give_about_their_pixels(kind):
    smooth = np.stack([np.linspace(0, 255, 30)[None].repeat(20, 0)] * 3, -1).astype(np.uint8)
    read_back = pixels(encode(Image.fromarray(smooth), kind))
    assert read_back.shape == (3, 20, 30)
    assert np.abs(read_back.transpose(1, 2, 0).astype(int) - smooth).mean() < 4


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
    assert pixels(encode(colour(mode), kind)).shape == (channels, 20, 30)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("mode", "kind"), [("1", "PNG"), ("L", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("CMYK", "JPEG")]
)
def test_channels_can_be_chosen(mode, kind, channels):
    assert pixels(encode(colour(mode), kind), channels=channels).shape == (channels, 20, 30)


def test_a_palette_is_looked_up():
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    read_back = read_picture(encode(palette, "PNG"), Preparation((1, 2))).pixels
    assert read_back[:, 0].T.tolist() == [[10, 20, 30], [200, 100, 50]]
    grey = read_picture(encode(palette, "PNG"), Preparation((1, 2), channels=1)).pixels
    assert grey[0, 0].tolist() == [
        round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in [(10, 20, 30), (200, 100, 50)]
    ]


def test_one_bit_is_black_and_white():
    assert set(np.unique(pixels(encode(colour("1"), "PNG")))) == {0, 255}


def test_transparency_goes_over_white():
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
    assert [read_picture(p, Preparation((1, 2))).channels for p in (used, unused)] == [4, 3]


def test_photographs_are_turned_upright():
    """A camera on its side writes the picture lying, and the turn into EXIF tag 274: 6 is a quarter to the right."""
    exif = Image.Exif()
    exif[274] = 6
    lying = Image.fromarray(np.rot90(NOISE[3], 1).copy())
    for kind in ("PNG", "TIFF"):
        read_back = pixels(encode(lying, kind, exif=exif))
        np.testing.assert_array_equal(read_back.transpose(1, 2, 0), NOISE[3])


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (30, 20), (value, 0, 0)) for value in (255, 0)]
    read_back = pixels(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (read_back[0] == 255).all()


# ---------------------------------------------------------------- more than 8 bits


DEEP_NOISE = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)


def png16(colour_type: int) -> bytes:
    """A 16-bit PNG, written by hand: Pillow writes none in colour."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    values = np.repeat(DEEP_NOISE[..., None], channels, -1).astype(">u2")

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 30, 20, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg2000(bits: int) -> bytes:
    """An 8-bit JPEG 2000 image whose header says another depth (SIZ segment of ISO 15444-1, A.5.1)."""
    data = bytearray(encode(colour(), "JPEG2000"))
    siz = data.index(b"\xff\x51")
    data[siz + 2 + 38] = bits - 1
    return bytes(data)


def tiff16(order: str, photometric: int) -> bytes:
    """A 16-bit TIFF, written by hand (TIFF 6.0, sections 2 and 6).

    Args:
        order: of the bytes, "<" or ">".
        photometric: 0 white is zero, 1 black is zero, 2 colour.
    """
    count = 3 if photometric == 2 else 1
    values = np.repeat(DEEP_NOISE[..., None], count, -1)
    body = (65535 - values if photometric == 0 else values).astype(f"{order}u2").tobytes()
    depth = 8 if count == 3 else 16  # where they stand, or the depth itself
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


WIDE = {
    "colour PNG": png16(2),
    "grey PNG with alpha": png16(4),
    "colour PNG with alpha": png16(6),
    "colour TIFF": tiff16("<", 2),
    "big colour TIFF": tiff16(">", 2),
    "signed TIFF": encode(Image.fromarray(DEEP_NOISE), "TIFF", tiffinfo={339: 2}),
    "32-bit TIFF": encode(Image.fromarray(RNG.integers(0, 70000, (20, 30)).astype(np.int32)), "TIFF"),
    "float TIFF": encode(Image.fromarray(RNG.random((20, 30)).astype(np.float32)), "TIFF"),
    "float PFM": encode(Image.fromarray(RNG.random((20, 30)).astype(np.float32)), "PPM"),
    "colour PPM": b"P6\n30 20\n65535\n" + RNG.integers(0, 256, 3600, dtype=np.uint8).tobytes(),
    "12-bit PGM": b"P5\n30 20\n4095\n" + RNG.integers(0, 16, 1200, dtype=np.uint8).tobytes(),
    "JPEG 2000": jpeg2000(12),
}


def deep(kind: str = "PNG", **options) -> bytes:
    return encode(Image.fromarray(DEEP_NOISE), kind, **options)


DEEP_GREY = {
    "PNG by hand": png16(0),
    "PNG": deep(),
    "TIFF": deep("TIFF"),
    "TIFF, little end first": tiff16("<", 1),
    "TIFF, big end first": tiff16(">", 1),
    "TIFF whose white is zero": tiff16("<", 0),
    "TIFF by LZW": deep("TIFF", compression="tiff_lzw"),
    "PGM": b"P5\n30 20\n65535\n" + DEEP_NOISE.astype(">u2").tobytes(),
    "JPEG 2000": deep("JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("name", DEEP_GREY)
def test_one_channel_of_sixteen_bits_is_read_whole(name):
    picture = read_picture(DEEP_GREY[name], AS_IS)
    assert picture.levels == 65536
    assert picture.pixels.dtype == np.uint16
    np.testing.assert_array_equal(picture.pixels[0], DEEP_NOISE)


@pytest.mark.parametrize(("channels", "opaque"), [(1, []), (3, []), (4, [65535])])
def test_sixteen_bits_become_colour_where_it_is_asked_for(channels, opaque):
    found = pixels(deep(), channels=channels)
    assert found.shape == (channels, 20, 30)
    for plane in found[:3]:
        np.testing.assert_array_equal(plane, DEEP_NOISE)
    assert (found[3:] == 65535).all()
    assert len(found[3:]) == len(opaque)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_turned_upright(kind):
    exif = Image.Exif()
    exif[274] = 6
    lying = encode(Image.fromarray(np.rot90(DEEP_NOISE, 1).copy()), kind, exif=exif)
    np.testing.assert_array_equal(pixels(lying)[0], DEEP_NOISE)


@pytest.mark.parametrize("size", [(20, 30), (16, 16), (7, 9), (33, 40)])
@pytest.mark.parametrize("center_crop", [False, True])
def test_sixteen_bits_are_resized_as_eight_are(size, center_crop):
    """Level v of 8 bits and level 257 v of 16 are the same value; 8 bits are rounded to half a level."""
    shallow = RNG.integers(0, 256, (28, 45), dtype=np.uint8)
    preparation = Preparation(size, center_crop=center_crop)
    eight = read_picture(encode(Image.fromarray(shallow), "PNG"), preparation)
    sixteen = read_picture(encode(Image.fromarray(shallow.astype(np.uint16) * 257), "PNG"), preparation)
    assert sixteen.pixels.shape == eight.pixels.shape
    assert sixteen.enlarged == eight.enlarged
    assert np.abs(sixteen.pixels / 257 - eight.pixels).max() < 1.1
    assert np.abs(sixteen.pixels / 257 - eight.pixels).mean() < 0.5


def test_depths_do_not_mix():
    with pytest.raises(ConfigError, match=r"'0.png' has 8 bits a channel, '1.png' has 16; convert"):
        read_given([encode(colour("L"), "PNG"), deep()])
    reading = read_given([deep(), deep()])
    assert (reading.images.levels, reading.highest) == (65536, DEEP_NOISE.max())
    with pytest.raises(ConfigError, match="differ in depth"):
        check_alike(reading, read_given([encode(colour("L"), "PNG")]))


def test_sixteen_bits_from_memory_and_from_the_file():
    payloads = [encode(Image.fromarray(np.roll(DEEP_NOISE, i)), "PNG") for i in range(3)]
    packed, lazy = read_given(payloads), read_given(payloads, memory_limit=0)
    assert isinstance(lazy.images, LazyImages)
    assert packed.fingerprint == lazy.fingerprint
    for index in range(3):
        assert torch.equal(packed.images.image(index), lazy.images.image(index))
    assert packed.images.stack.dtype == torch.uint16
    assert lazy.images.levels == 65536


@pytest.mark.parametrize("other", [encode(colour("L"), "PNG"), encode(colour(), "PNG")])
def test_an_image_that_becomes_another_kind_is_named(other):
    """Eight bits among sixteen would be almost black, without an error."""
    given = Given(["a.png", "b.png"], [deep(), deep()])
    reading = read(given, AS_IS, skip_bad=False, memory_limit=0)
    given.payloads[1] = other
    with pytest.raises(
        RunError, match=r"'b.png' of .* became another kind of image: it is .*, not grey \(1 channel of"
    ):
        reading.images.image(1)


@pytest.mark.parametrize("name", WIDE)
def test_wide_values_are_refused_and_never_cut(name):
    with pytest.raises(ConfigError, match="not supported yet") as caught:
        read_given([encode(colour(), "PNG"), WIDE[name]], skip_bad=True)
    message = str(caught.value)
    assert "'1.png'" in message
    assert "\n" not in message


@pytest.mark.parametrize(("flags", "bits"), [(0x0C, 8), (0x4C, 10), (0x6C, 12)])
def test_the_depth_of_avif_stands_in_its_header(flags, bits):
    """Pillow writes 8 bits only, and its decoder refuses a header that lies, so the header is read by itself.

    The flags are the third byte of the box ``av1C`` (AV1 in ISO base media files, section 2.3.3).
    """
    data = encode(colour(), "AVIF")
    place = data.index(b"av1C") + 6
    assert data[place] == 0x0C
    assert depth._depth_in_header("AVIF", data[:place] + bytes([flags]) + data[place + 1 :]) == bits


@pytest.mark.parametrize("header", [b"P6\n30 20\n255\n", b"P6\n30 20\n100\n"])
def test_eight_bits_and_less_are_fine(header):
    assert pixels(header + bytes(1800)).shape == (3, 20, 30)


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("flat", [(40, 60), (100, 40), (10, 15), (21, 33), (7, 500)])
@pytest.mark.parametrize("size", [(20, 30), (16, 16), (32, 8)])
@pytest.mark.parametrize("center_crop", [False, True])
def test_the_image_just_covers_the_size(flat, size, center_crop):
    image = Image.new("L", flat[::-1], 200)
    picture = read_picture(encode(image, "PNG"), Preparation(size, center_crop=center_crop))
    height, width = picture.pixels.shape[1:]
    assert (picture.pixels == 200).all()
    assert picture.enlarged == (flat[0] < size[0] or flat[1] < size[1])
    if center_crop:
        assert (height, width) == size
        return
    assert height == size[0] or width == size[1]
    assert height >= size[0]
    assert width >= size[1]
    scale = max(size[0] / flat[0], size[1] / flat[1])
    assert abs(height - scale * flat[0]) < 1
    assert abs(width - scale * flat[1]) < 1


def test_the_middle_is_cropped_and_shrinking_is_antialiased():
    stripes = np.zeros((20, 90), dtype=np.uint8)
    stripes[:, 30:60:2] = 255  # the middle third: thin lines
    image = Image.fromarray(stripes).resize((360, 80), Image.Resampling.NEAREST)
    middle = pixels(encode(image, "PNG"), center_crop=True)[0].astype(float)
    assert middle.shape == (20, 30)
    assert np.abs(middle[:, 1:-1:2] - middle[:, 2::2]).mean() > 100
    fine = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (80, 240)))
    assert np.abs(pixels(encode(fine, "PNG"), center_crop=True).astype(float) - 127.5).max() < 12


# ---------------------------------------------------------------- reading all


def broken() -> dict[str, bytes | None]:
    whole = {kind: encode(colour(), kind) for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")}
    halves = {f"half a {kind}": data[: len(data) // 2] for kind, data in whole.items()}
    damaged = bytearray(whole["PNG"])
    damaged[len(damaged) // 2] ^= 255
    return halves | {
        "nothing": b"",
        "no bytes": None,
        "text": b"not an image at all",
        "a flipped byte": bytes(damaged),
        "a header": whole["JPEG"][:20],
    }


@pytest.mark.parametrize("name", broken())
def test_broken_images_are_named_before_the_run(name):
    good = encode(colour(), "PNG")
    payloads = [good, broken()[name], good]
    with pytest.raises(ConfigError, match=r"--train_data_dir 'photos': 1 of 3 images cannot be read") as caught:
        read_given(payloads)
    assert "'1.png'" in str(caught.value)
    assert "--skip_bad_images" in str(caught.value)
    assert "\n" not in str(caught.value)
    reading = read_given(payloads, skip_bad=True)
    assert (len(reading.images), reading.skipped) == (2, 1)
    assert reading.names == ["0.png", "2.png"]


def test_when_all_are_broken_none_is_left():
    with pytest.raises(ConfigError, match="no image is left, 2 of 2"):
        read_given([b"", b"x"], skip_bad=True)


def test_the_first_of_several_is_named():
    with pytest.raises(ConfigError, match=r"2 of 3 images cannot be read: the first is '0.png'"):
        read_given([b"", encode(colour(), "PNG"), b"x"])


def test_mixed_channels_name_two_images_and_the_way_out():
    payloads = [encode(colour(), "PNG"), encode(colour(), "PNG"), encode(colour("L"), "PNG")]
    with pytest.raises(ConfigError, match=r"'0.png' is colour \(3\), '2.png' is grey \(1\); --channels"):
        read_given(payloads)
    for channels in (1, 3, 4):
        assert read_given(payloads, Preparation((20, 30), channels)).images.channels == channels


@pytest.mark.parametrize("center_crop", [False, True])
def test_memory_and_file_give_the_same_pixels(center_crop):
    payloads = [encode(colour().resize((30 + 7 * i, 50 - 3 * i)), "PNG") for i in range(7)]
    preparation = Preparation((20, 30), center_crop=center_crop)
    packed = read_given(payloads, preparation)
    lazy = read_given(payloads, preparation, memory_limit=5000)
    assert isinstance(packed.images, PackedImages)
    assert isinstance(lazy.images, LazyImages)
    assert packed.fingerprint == lazy.fingerprint
    assert len(packed.images) == len(lazy.images) == 7
    for index in range(7):
        assert torch.equal(packed.images.image(index), lazy.images.image(index))
    assert (packed.images.stack is not None) == center_crop


def test_an_image_that_breaks_later_is_named():
    payloads = [encode(colour(), "PNG")] * 3
    given = Given(["a.png", "b.png", "c.png"], payloads)
    reading = read(given, AS_IS, skip_bad=False, memory_limit=0)
    given.payloads[1] = b""
    assert reading.images.image(2).shape == (3, 20, 30)
    with pytest.raises(RunError, match=r"'b.png' of --train_data_dir 'photos' became unreadable"):
        reading.images.image(1)


def test_the_fingerprint_sees_a_pixel_a_name_and_the_order():
    one, other = encode(colour(), "PNG"), encode(colour().rotate(180), "PNG")
    base = read_given([one, other]).fingerprint
    assert read_given([one, other]).fingerprint == base
    assert read_given([other, one]).fingerprint != base
    assert read_given([one, one]).fingerprint != base
    renamed = Given(["0.png", "x.png"], [one, other])
    assert read(renamed, AS_IS, skip_bad=False, memory_limit=10**9).fingerprint != base


def test_very_large_images_are_read_without_a_warning():
    """Pillow warns of more than 89 million pixels; under -W error that would be an unreadable image."""
    large = encode(Image.new("1", (9600, 9600)), "PNG")
    assert read_given([large]).images.channels == 1


def test_no_bytes_are_no_image():
    with pytest.raises(BadImage, match="empty"):
        read_picture(None, AS_IS)
