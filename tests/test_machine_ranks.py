"""Machine profiles of several ranks: files, refusals, and profiles joined to one."""

import pytest
import yaml
from conftest import ROOT, set_key
from planning import machine_profile, several_ranks, small_model

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.machine_parts import Network
from fiddler_opt.inputs.machine_ranks import joined
from fiddler_opt.insight.sources import profile_sha256
from fiddler_run.errors import FiddlerError

MODEL = small_model()
FAST = machine_profile(MODEL, host=40.0)
SLOW = machine_profile(MODEL, device=20.0, host=90.0, kind="cpu")
NETWORK = Network(round_trip_us=20.0, bytes_per_s=1e9)
SHIPPED = MachineProfile.load(ROOT / "profiles" / "rtx4090.machine.yaml")


def test_a_profile_of_several_ranks_survives_its_file():
    machine = several_ranks(FAST, SLOW, FAST)
    assert MachineProfile.parse(machine.dump(), "m.yaml") == machine
    assert machine.num_ranks == 3


def test_a_profile_of_one_rank_is_written_as_before():
    text = FAST.dump()
    assert "other_ranks" not in text
    assert "network" not in text
    shipped = "73cffa376604dfd79a087c70161040837b1d46bfc2bdb7d4420dde01020d0eaf"
    assert profile_sha256(SHIPPED) == shipped


def test_each_rank_has_a_profile_of_its_own():
    machine = several_ranks(FAST, SLOW)
    assert machine.rank_profile(0) == FAST
    other = machine.rank_profile(1)
    assert other.host_expert_us == SLOW.host_expert_us
    assert other.device == SLOW.device
    assert other.dense_layer_us == FAST.dense_layer_us
    assert machine.first_ranks(1) == FAST
    assert machine.first_ranks(2) == machine
    with pytest.raises(FiddlerError, match="3 sizes, a rank each, but the machine profile has 2"):
        machine.first_ranks(3)


def test_joined_profiles_number_their_machines():
    """The second machine has two ranks."""
    two = FAST.model_copy(update={"other_ranks": [FAST.as_rank(0, machine=0)], "network": NETWORK})
    machine = joined([SLOW, two, FAST], ["a", "b", "c"], NETWORK)
    assert [rank.machine for rank in machine.other_ranks] == [1, 1, 2]
    assert machine.problems() == []


def test_profiles_of_other_experts_are_not_joined():
    other = machine_profile(small_model(intermediate_size=256))
    with pytest.raises(FiddlerError, match="b.yaml: was timed on other experts than a.yaml; .*--m"):
        joined([FAST, other], ["a.yaml", "b.yaml"], NETWORK)


def test_all_ranks_are_converted_to_an_encoding():
    machine = joined([SHIPPED, SHIPPED], ["a", "b"], NETWORK)
    packed = machine.in_encoding("lossless12")
    for number in range(2):
        assert packed.rank_profile(number) == SHIPPED.in_encoding("lossless12")
    assert packed.in_encoding("bf16") == machine


def test_an_encoding_must_be_timed_by_all_ranks():
    plain = SHIPPED.model_copy(update={"encodings": {}})
    machine = joined([SHIPPED, plain], ["a", "b"], NETWORK)
    assert machine.timed_encodings == []
    assert machine.in_encoding("lossless12") is machine
    assert machine.first_ranks(1).timed_encodings == ["lossless12"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("other_ranks.0.host_expert_us", {2: {0.0: 1.0}}, "host_expert_us: needs an entry for 1"),
        ("other_ranks.0.host_expert_us", {1: {0.5: 1.0}}, "host_expert_us[1]: needs an entry for"),
        ("other_ranks.0.link", None, "link: must be given for a device of kind cuda"),
        ("other_ranks.0.drift", ..., None),
        ("other_ranks.0.cpu", ..., "cpu: missing"),
        ("other_ranks.0.machine", 2, "machine: 2, but after a rank of machine 0 comes one of 0 or"),
        ("other_ranks.0.dense_layer_us", {1: 1.0}, "dense_layer_us: unknown key"),
        ("network", ..., "m.yaml: network: missing, but there are other_ranks"),
        ("other_ranks", ..., "m.yaml: network: only with other_ranks; remove it"),
        ("network.bytes_per_s", 0.0, "m.yaml: network.bytes_per_s: "),
    ],
)
def test_wrong_ranks_are_refused_by_key(path, value, words):
    data = several_ranks(SLOW, FAST).model_dump()
    set_key(data, path.split("."), value)
    _, problems = MachineProfile.examine(yaml.safe_dump(data), "m.yaml")
    if words is None:
        assert problems == []
        return
    expected = words if words.startswith("m.yaml") else f"m.yaml: other_ranks[0].{words}"
    assert problems[0].startswith(expected)


def test_blocks_of_an_encoding_have_one_size():
    data = joined([SHIPPED, SHIPPED], ["a", "b"], NETWORK).model_dump()
    experts = data["other_ranks"][0]["encodings"]["lossless12"]
    experts["block_neurons"] *= 2
    _, problems = MachineProfile.examine(yaml.safe_dump(data), "m.yaml")
    assert any("encodings.lossless12.block_neurons: " in each for each in problems)
