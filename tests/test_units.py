import pytest

from fiddler_opt.units import format_bytes, parse_bytes
from fiddler_run.errors import FiddlerError


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24_000_000_000), ("24GiB", 25_769_803_776), ("0GB", 0), ("1.5 MB", 1_500_000), ("512KiB", 524_288), ("7B", 7)],
)
def test_parse(text, size):
    assert parse_bytes(text, "--gpu-mem") == size


@pytest.mark.parametrize("text", ["24", "GB", "24gb", "24 G", "-1GB", "1e9B", "", "nanGB"])
def test_refuses(text):
    with pytest.raises(FiddlerError, match="--gpu-mem"):
        parse_bytes(text, "--gpu-mem")


def test_a_bare_number_is_told_both_units():
    with pytest.raises(FiddlerError, match=r"24GB \(10\^9 bytes\) or 24GiB \(2\^30 bytes\)"):
        parse_bytes("24", "--gpu-mem")


def test_format():
    assert [format_bytes(n) for n in (0, 999, 1500, 352_321_536, 24e9)] == ["0 B", "999 B", "1.50 KB", "352.32 MB", "24.00 GB"]
