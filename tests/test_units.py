"""Sizes, rates and lists of values as users write them."""

import pytest

from fiddler_opt.units import (
    format_bytes,
    format_bytes_per_s,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_network,
    parse_sizes,
    parse_values,
    round_values,
)
from fiddler_run.errors import FiddlerError

GB = 10**9
GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24_000_000_000),
        ("24GiB", 25_769_803_776),
        ("0GB", 0),
        ("1.5 MB", 1_500_000),
        ("512KiB", 524_288),
        ("7B", 7),
    ],
)
def test_sizes_are_parsed(text, size):
    assert parse_bytes(text, "--gpu-mem") == size


@pytest.mark.parametrize("text", ["24", "GB", "24gb", "24 G", "-1GB", "1e9B", "", "nanGB"])
def test_malformed_sizes_are_refused(text):
    with pytest.raises(FiddlerError, match="--gpu-mem"):
        parse_bytes(text, "--gpu-mem")


def test_error_of_a_bare_number_names_both_units():
    with pytest.raises(FiddlerError, match=r"24GB \(10\^9 bytes\) or 24GiB \(2\^30 bytes\)"):
        parse_bytes("24", "--gpu-mem")


def test_rates_are_parsed_and_formatted():
    assert parse_bytes_per_s("31.5GB/s", "--link") == 31_500_000_000
    assert format_bytes_per_s(31.5e9) == "31.50 GB/s"
    for text in ("25GB", "25/s", "25GB/", "25GB/min", "0GB/s", "fast"):
        with pytest.raises(FiddlerError, match="--link"):
            parse_bytes_per_s(text, "--link")


def test_lists_and_ranges_are_parsed():
    assert parse_values("8GB", "--gpu-mem", parse_bytes) == [8 * GB]
    assert parse_values("24GB, 8GB,8000MB", "--gpu-mem", parse_bytes) == [8 * GB, 24 * GB]
    assert parse_values("1..4", "--beams", parse_count) == [1, 2, 3, 4]
    for text in ("1,,2", "1..", "..2", "2..1", "2..2", "1..2..3", "1,2..3", "", "-1..3", "1.5"):
        with pytest.raises(FiddlerError, match=r"^--beams"):
            parse_values(text, "--beams", parse_count)


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [
        (8 * GB, 48 * GB, [n * GB for n in range(8, 49, 4)]),
        (8 * GB, 24 * GB, [n * GB for n in range(8, 25, 2)]),
        (12 * GB, 50 * GB, [n * GB for n in (12, 15, 20, 25, 30, 35, 40, 45, 50)]),
        (8 * GIB, 48 * GIB, [n * GIB for n in range(8, 49, 4)]),
        (2048, 32768, [2048, *range(4096, 32769, 4096)]),
        (128, 4096, [128, *range(512, 4097, 512)]),
        (1, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_ranges_are_split_at_round_values(low, high, values):
    assert round_values(low, high) == values


def test_any_range_has_a_handful_of_values():
    for low in (0, 1, 7, 100, 1024, 10**9 + 1):
        for span in (1, 2, 5, 6, 13, 97, 1000, 4096, 12345, 10**9, 10**15):
            values = round_values(low, low + span)
            assert values[0] == low
            assert values[-1] == low + span
            assert min(span + 1, 6) <= len(values) <= 13
            assert values == sorted(set(values))


def test_sizes_are_formatted():
    assert [format_bytes(n) for n in (0, 999, 1500, 352_321_536, 24e9)] == [
        "0 B",
        "999 B",
        "1.50 KB",
        "352.32 MB",
        "24.00 GB",
    ]


NINES = "9" * 400


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_bytes, f"{NINES}GB"),
        (parse_bytes, f"{NINES}.5B"),
        (parse_bytes, "1153000000TB"),
        (parse_bytes_per_s, f"{NINES}GB/s"),
        (parse_bytes_per_s, "2000000000000GB/s"),
        (parse_count, NINES),
        (parse_count, "9" * 5000),
        (parse_count, "2147483648"),
    ],
)
def test_absurd_sizes_are_refused(parse, text):
    with pytest.raises(FiddlerError, match=r"^--flag \d+(\.\.\.|\S*): more than") as caught:
        parse(text, "--flag")
    assert len(str(caught.value)) < 120


def test_largest_sizes_are_parsed():
    assert parse_bytes("1048576TiB", "--gpu-mem") == 2**60
    assert parse_count("0002147483647", "--beams") == 2**31 - 1


def test_networks_are_parsed():
    assert parse_network("0.2ms,1GB/s", "--network") == (200.0, GB)
    assert parse_network("30us, 20GB/s", "--network") == (30.0, 20 * GB)


@pytest.mark.parametrize(
    "text", ["0.2ms", "1GB/s", "0.2,1GB/s", "0ms,1GB/s", "1ms,1GB", "1ms,0B/s"]
)
def test_malformed_networks_are_refused(text):
    with pytest.raises(FiddlerError, match="--network"):
        parse_network(text, "--network")


def test_lists_of_sizes_keep_their_order():
    assert parse_sizes("24GB,0GB,16GB", "--gpu-mem") == [24 * GB, 0, 16 * GB]
