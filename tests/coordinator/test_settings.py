"""run.toml: what is read, what is refused and with which words, and what the template says."""

import math
import os
import tomllib
from pathlib import Path

import annotated_types
import pytest
from pydantic.fields import FieldInfo

from coordinator.settings import TEMPLATE, Settings, describe_settings, render
from coordinator.settings_problems import known_settings
from coordinator.signed import differences, run_config
from protocol.documents import Codec, Digest, RunConfig, RunId, ShardRef, parse_payload, payload_of
from protocol.errors import ConfigInvalid


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigInvalid) as caught:
        Settings.parse(text, overrides)
    return caught.value.message


def config_of(settings: Settings) -> RunConfig:
    shard = ShardRef(sha256="a" * 64, size=10, samples=2, height=8, width=8)
    heldout = ShardRef(sha256="b" * 64, size=10, samples=2, height=8, width=8)
    return run_config(settings, shards=(shard,), heldout=heldout, seed=bytes(32), genesis_sha256=Digest("c" * 64))


def test_the_template_reads_back_as_the_defaults() -> None:
    assert Settings.parse(TEMPLATE) == Settings()


def test_the_template_explains_every_setting_on_the_line_before_it() -> None:
    lines = TEMPLATE.splitlines()
    for described in describe_settings():
        key = described.name.partition(".")[2]
        places = [i for i, line in enumerate(lines) if line.startswith((f"{key} = ", f"# {key} = "))]
        assert places, described.name
        assert all(lines[place - 1].startswith("# ") for place in places)
        assert described.sentence.endswith(".")


def test_rendered_settings_read_back_with_quotes_newlines_and_control_characters() -> None:
    text = 'He said "no".\n\\ back\tslash, \x7f, \u00e9 and \U0001f600 \'\'\' """ \r end'
    settings = Settings.parse("", ["training.lr=1e-5", "server.public_url=https://example.org/x"])
    changed = settings.model_copy(update={"run": settings.run.model_copy(update={"terms": text, "name": 'a "b" \\'})})
    assert Settings.parse(render(changed)) == changed


def test_a_value_of_the_wrong_type_is_named_with_what_would_be_right() -> None:
    message = refusal('[training]\nsteps = "many"')
    assert message == 'training.steps is "many"; it must be a whole number from 1 to 100,000.'
    assert refusal("[training]\nsteps = 1.5").startswith("training.steps is 1.5; it must be a whole number")
    assert refusal("[training]\nsteps = true").startswith("training.steps is true;")
    assert refusal("[run]\nname = 3") == "run.name is 3; it must be a text in quotes of 1 to 256 characters."


def test_a_value_out_of_range_is_named_with_its_range() -> None:
    assert refusal("[training]\nlr = 0.0") == "training.lr is 0; it must be a number above 0, at most 10."
    assert refusal("[training]\nbeta1 = 1") == "training.beta1 is 1; it must be a number at least 0, below 1."
    assert refusal("[training]\ntext_dropout = 1.01").endswith("it must be a number from 0 to 1.")
    assert refusal("[training]\nlr = nan").startswith("training.lr is NaN; it must be a number above 0")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("mode=all", 'mode is "all"; it must be "replay" or "none".'),
        ("tolerance=0", "tolerance is 0; it must be a number above 0, at most 1."),
        ("code_tolerance=1.5", "code_tolerance is 1.5; it must be a number above 0, at most 1."),
        ("tolerance=tight", 'tolerance is "tight"; it must be a number above 0, at most 1.'),
        ("probation=0", "probation is 0; it must be a whole number from 1 to 10,000."),
        ("floor=1.5", "floor is 1.5; it must be a number from 0 to 1."),
        ("referee_share=-1", "referee_share is -1; it must be a number from 0 to 1."),
        ("ramp=0", "ramp is 0; it must be a whole number from 1 to 1,000,000."),
        ("owner_cap=0", "owner_cap is 0; it must be a number from 0.001 to 1."),
        (
            "weighting=loudest",
            'weighting is "loudest"; it must be "mean" or "geometric-median" or "multi-krum" or "nnm-clip".',
        ),
        ("hostile_share=0.5", "hostile_share is 0.5; it must be a number from 0 to 0.49."),
        ("norm_bound=0.5", "norm_bound is 0.5; it must be a number at least 1."),
        ("norm_bound=inf", "norm_bound is Infinity; it must be a number at least 1."),
        ("screen_triples=65537", "screen_triples is 65537; it must be a whole number from 0 to 65,536."),
        (
            "evidence_sha256=abc",
            'evidence_sha256 is "abc"; it must be a SHA-256 in 64 hex digits, or be left out.',
        ),
    ],
)
def test_a_wrong_rule_of_verification_is_named_with_what_would_be_right(override: str, sentence: str) -> None:
    assert refusal("", f"verification.{override}") == f"verification.{sentence}"


def test_an_unknown_setting_is_answered_with_the_nearest_known_one() -> None:
    assert refusal("[training]\nstpes = 3") == "training.stpes is no setting; did you mean training.steps?"
    assert refusal("[rounds]\nsteps = 3") == "rounds.steps is no setting; did you mean training.steps?"
    assert refusal("[trainin]\nsteps = 3") == "trainin is no section; did you mean training?"
    assert refusal("training = 3") == "training is 3; it must be a section, written [training] on a line of its own."


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[rounds]\nunits = 4\nmin_units = 9", ("rounds.min_units is 9", "rounds.units is 4")),
        ("[training]\nsteps = 5\nsegment_steps = 6", ("training.segment_steps is 6", "training.steps is 5")),
        (
            "[training]\nsteps = 2\nwarmup_steps = 3\nsegment_steps = 1",
            ("training.warmup_steps is 3", "training.steps is 2"),
        ),
        ("[server]\nport = 80\npublic_port = 80", ("server.port", "server.public_port", "80")),
        ('[training]\nprecision = "bf16"', ('training.precision is "bf16"', "training.eps is 1e-08", "1e-4")),
        (
            '[training]\nprecision = "bf16"\neps = 1e-4',
            ('training.precision is "bf16"', "verification.tolerance is 0.0001", "to 0.008"),
        ),
        (
            '[training]\nprecision = "bf16"\neps = 1e-4\n[verification]\ntolerance = 0.01',
            ('training.precision is "bf16"', "verification.code_tolerance is 0.001", "to 0.04"),
        ),
    ],
)
def test_two_settings_that_conflict_are_both_named_with_their_values(text: str, named: tuple[str, ...]) -> None:
    message = refusal(text)
    assert all(part in message for part in named), message


def test_a_run_in_bf16_says_so_in_its_config_and_reads_back() -> None:
    overrides = ["training.precision=bf16", "training.eps=1e-4"]
    wide = ["verification.tolerance=0.01", "verification.code_tolerance=0.04"]
    settings = Settings.parse("", [*overrides, *wide])
    config = config_of(settings)
    assert config.training.precision == "bf16"
    assert differences(settings, config) == ()
    (difference,) = differences(Settings.parse("", ["training.eps=1e-4", *wide]), config)
    assert str(difference) == 'training.precision is "fp32" in run.toml, but "bf16" in the signed run.'
    assert config_of(Settings.parse("", [*overrides, "verification.mode=none"])).training.precision == "bf16"


def test_deltas_of_a_new_run_are_ternary_unless_the_operator_says_otherwise() -> None:
    assert config_of(Settings.parse("")).codec == Codec(kind="dither", levels=1, block=1024, reach=704, width=64)
    seven = Settings.parse("", ["codec.levels=7"])
    assert config_of(seven).codec.levels == 7
    (difference,) = differences(Settings.parse(""), config_of(seven))
    assert str(difference) == "codec.levels is 1 in run.toml, but 7 in the signed run."


def test_all_problems_are_told_at_once() -> None:
    message = refusal('[training]\nsteps = "x"\nlr = -1\n[outer]\nlrr = 1')
    assert "3 problems" in message
    assert all(name in message for name in ("training.steps", "training.lr is -1", "outer.lrr"))


def test_text_that_is_not_toml_is_refused_with_its_line() -> None:
    message = refusal("[run]\nname = \n")
    assert "not valid TOML" in message
    assert "line 2" in message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("server.bind=localhost", 'server.bind is "localhost"; it must be an IP address'),
        ("server.advertised_host=a b", 'server.advertised_host is "a b"; it must be a host name'),
        ("server.advertised_host=example.org:80", "without a port"),
        ("server.public_url=ftp://example.org", "it must be a web address"),
        ("server.public_url=http://[::1/", 'server.public_url is "http://[::1/"; it must be a web address'),
        ("server.public_url=http://me:word@example.org", "it must be a web address"),
        ("server.public_url=http://example.org/?x=1", "it must be a web address"),
        ("server.public_url=http://127.0.0.1:99999", "its port must be a whole number from 1 to 65535."),
        ("server.public_url=http://h:x/", "its port must be a whole number from 1 to 65535."),
        ("server.public_url=http://h:0", "its port must be a whole number from 1 to 65535."),
        ("codec.block=100", "codec.block is 100; it must be a power of two, such as 64 or 128."),
        ("codec.levels=0", "codec.levels is 0; "),
        ("codec.levels=128", "codec.levels is 128; "),
        ("codec.reach=0.5", "codec.reach is 0.5; "),
        ("codec.width=1.5", "codec.width is 1.5; "),
        ("codec.levels=ternary", 'codec.levels is "ternary"; it must be a whole number'),
        ("patch.block=1000", "patch.block is 1000; it must be a power of two, such as 512 or 1024."),
        ("model.preset=d99", 'model.preset is "d99"; it must be "d12" or'),
        ("rounds.stages=2:32", 'rounds.stages is "2:32"; it must be pairs'),
        ("rounds.stages=1:32 1:64", "rounds rising from 1"),
        ("rounds.stages=1:0", "it must be pairs of a round and a side"),
        ("rounds.stages=1", "it must be pairs of a round and a side"),
        ("training.lr=fast", 'training.lr is "fast"; it must be a number'),
        ("steps=4", "is not of the form section.key=value"),
        ("training.stps=4", "did you mean training.steps?"),
    ],
)
def test_a_wrong_override_is_refused_like_a_wrong_file(override: str, named: str) -> None:
    assert named in refusal("", override)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a=" + "[" * 5000, "nested too deeply"),
        ("a=" + "{b=" * 5000, "nested too deeply"),
        (".".join(["run", *["a"] * 5000]) + "=1", "run.a is no setting"),
        (".".join(["run.name", *["a"] * 5000]) + "=1", "run.name is (nested too deeply to show)"),
        ("[rounds]\nunits=" + "9" * 5000, "not valid TOML"),
    ],
    ids=["arrays", "tables", "unknown setting", "known setting", "digits"],
)
def test_a_file_that_is_made_to_break_its_reader_is_refused_with_a_sentence(text: str, named: str) -> None:
    assert named in refusal(text)
    assert refusal("", "rounds.units=" + "[" * 5000).startswith('rounds.units is "[[[')


def test_a_file_that_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(ConfigInvalid, match=f"{name} can't be read \\(it is no plain file\\)"):
            Settings.load(tmp_path / name)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ConfigInvalid, match="larger than"):
        Settings.load(tmp_path / "large")


def test_an_override_wins_over_the_file_and_texts_need_no_quotes() -> None:
    settings = Settings.parse("[training]\nsteps = 50", ["training.steps=40", "run.name=12", "outer.lr=1"])
    assert settings.training.steps == 40
    assert settings.run.name == "12"
    assert settings.outer.lr == 1.0


def test_shares_and_seconds_become_the_integers_of_the_run_config() -> None:
    settings = Settings.parse(
        "",
        [
            "training.text_dropout=0.25",
            "rounds.staleness_discount=0.5",
            "rounds.lease_seconds=1.5",
            "verification.floor=0.125",
            "verification.owner_cap=1",
        ],
    )
    config = config_of(settings)
    assert config.training.text_dropout == 2**14
    assert config.rounds.staleness_discount == 2**23
    assert config.rounds.lease_ms == 1500
    assert config.verification.floor == 2**21
    assert config.verification.owner_cap == 2**24


def _extremes(field: FieldInfo) -> list[float]:
    """The smallest and the largest value that a numeric setting may have."""
    found: list[float] = []
    for part in field.metadata:
        match part:
            case annotated_types.Ge(ge=bound) | annotated_types.Le(le=bound):
                found.append(float(str(bound)))
            case annotated_types.Gt(gt=bound):
                found.append(math.nextafter(float(str(bound)), math.inf))
            case annotated_types.Lt(lt=bound):
                found.append(math.nextafter(float(str(bound)), -math.inf))
    return [int(value) for value in found] if field.annotation is int else found


@pytest.mark.parametrize("name", [name for name, field in known_settings(Settings) if _extremes(field)])
def test_whatever_the_settings_allow_the_run_config_can_say(name: str) -> None:
    section, key = name.split(".")
    field = dict(known_settings(Settings))[name]
    for value in _extremes(field):
        changed = getattr(Settings(), section).model_copy(update={key: value})
        type(changed).model_validate(changed.model_dump())
        config = config_of(Settings().model_copy(update={section: changed}))
        assert parse_payload(RunConfig, payload_of(config)) == config, (name, value)


def test_the_run_config_survives_being_signed_and_read() -> None:
    config = config_of(Settings())
    assert parse_payload(RunConfig, payload_of(config)) == config
    assert differences(Settings(), parse_payload(RunConfig, payload_of(config))) == ()


def test_every_signed_setting_that_differs_is_named_with_both_values() -> None:
    config = config_of(Settings())
    changed = Settings.parse(
        "",
        [
            "training.lr=0.003",
            "training.text_dropout=0.2",
            "rounds.lease_seconds=60",
            "verification.floor=0.1",
            "verification.mode=none",
        ],
    )
    found = [str(difference) for difference in differences(changed, config)]
    assert found == [
        "training.lr is 0.003 in run.toml, but 0.004 in the signed run.",
        "training.text_dropout is 0.2 in run.toml, but 0.1 in the signed run.",
        "rounds.lease_seconds is 60 in run.toml, but 300 in the signed run.",
        'verification.mode is "none" in run.toml, but "replay" in the signed run.',
        "verification.floor is 0.1 in run.toml, but 0.05 in the signed run.",
    ]


def test_only_server_and_storage_are_not_signed() -> None:
    config = config_of(Settings())
    # One setting has one choice only, and one needs others to change with it; all others get a value that is allowed
    # and not the default.
    fixed = {"model.preset", "training.precision"}
    fitting = {
        "model.text": "bytes",
        "rounds.stages": "1:8 4:16",
        "training.steps": "60",
        "codec.block": "64",
        "codec.reach": "3",
        "patch.block": "64",
        "rounds.min_units": "2",
        "training.optimizer": "adamw-factored",
        "verification.mode": "none",
        "verification.weighting": "mean",
        "verification.norm_bound": "7.5",
        "verification.evidence_sha256": "a" * 64,
    }
    by_kind = {"int": "7", "float": "0.125", "str": "other"}
    for name in [described.name for described in describe_settings()]:
        section, key = name.split(".")
        if section in ("server", "storage") or name in fixed:
            continue
        seconds = "9" if name.endswith("_seconds") else None
        value = fitting.get(name) or seconds or by_kind[type(getattr(getattr(Settings(), section), key)).__name__]
        found = differences(Settings.parse("", [f"{name}={value}"]), config)
        assert [difference.name for difference in found] == [name]
    moved = [
        "server.port=99",
        "server.bind=0.0.0.0",
        "storage.retain_rounds=3",
        "storage.snapshot_every=2",
        "storage.reserve_mib=1",
    ]
    assert differences(Settings.parse("", moved), config) == ()


def test_a_run_without_a_fixed_port_has_no_join_string_yet() -> None:
    run = RunId("a" * 64)
    assert Settings.parse("", ["server.port=0"]).server.join_string(run) is None
    assert str(Settings().server.join_string(run)) == f"cw1:127.0.0.1:7700:{run}"


def test_the_template_is_plain_toml_with_a_section_for_each_part() -> None:
    assert list(tomllib.loads(TEMPLATE)) == list(Settings.model_fields)
