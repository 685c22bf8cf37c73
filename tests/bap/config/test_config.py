"""Settings are refused when they are read: types, bounds, unknown names, files that are no YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
from bap.config import SHORT_NAMES, Config, config_of, full_names, known_settings, load_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("beta=.nan", "`budget.beta` to be a finite number, got nan"),
        ("beta=.inf", "`budget.beta` to be a finite number, got inf"),
        ("beta=0", "`budget.beta` to be greater than 0, got 0"),
        ("beta=true", "`budget.beta` to be a valid number, got True"),
        ("beta=", "`budget.beta` to be a valid number, got None"),
        ("beta='half'", "`budget.beta` to be a valid number, got 'half'"),
        ("beta=[0.5", "the value of 'beta=[0.5' to be YAML"),
        ("beta=@", "the value of 'beta=@' to be YAML"),
        ("settle=1.1", "`switches.freeze_at` to be less than or equal to 1, got 1.1"),
        *((f"{name}=-0.001", f"`{SHORT_NAMES[name]}` to be greater than or equal to 0, got -0.001")
          for name in ("lr_switch", "lr_norm", "lr_head", "lr_backbone", "pretrain_lr", "weight_decay")),
        ("lr_head=.nan", "`optimiser.lr_head` to be a finite number, got nan"),
        ("momentum=1", "`optimiser.momentum` to be less than 1, got 1"),
        ("temperature=0", "`sharing.temperature` to be greater than 0, got 0"),
        ("epochs=1.5", "`schedule.epochs` to be a valid integer, got 1.5"),
        ("epochs=0", "`schedule.epochs` to be greater than or equal to 1, got 0"),
        ("epochs=true", "`schedule.epochs` to be a valid integer, got True"),
        ("seed=-1", "`run.seed` to be greater than or equal to 0, got -1"),
        ("workers=-1", "`data.workers` to be greater than or equal to 0, got -1"),
        ("threads=0", "`run.threads` to be greater than or equal to 1, got 0"),
        ("size=4", "`data.size` to be greater than or equal to 8, got 4"),
        ("crops=rebuffi", "`data.crops` to be 'papers' for 'builtin', got 'rebuffi', which is of the decathlon"),
        ("size=64", "`data.size` to be 32, or left out, for 'builtin', whose images are drawn at that size, got 64"),
        ("full=1", "`data.full` to be a valid boolean, got 1"),
        ("domains=digits", "`data.domains` to be a valid list, got 'digits'"),
        ("domains=digits,shapes", "`data.domains` to be a valid list, got 'digits,shapes'. Hint: [digits,shapes]."),
        ("domains=[[a]]", "`data.domains[0]` to be a valid string, got ['a']"),
        ("domains=[a, a]", "`data.domains` to name each domain once"),
        ("device=gpu", "`run.device` to be 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        ("backend=fast", "`run.backend` to be one of [None, 'auto'"),
        ("sharing=none", "`sharing.loss` to be one of [None, 'int', 'union', 'jaccard'], got 'none'"),
        ("model=[]", "`model.name` to be one of ['resnet26'"),
        ("model_options=[1]", "`model.options` to be a valid dictionary, got [1]"),
        ("model_options={widths: [8, 8]}", "`model.options` to make a 'resnet26'"),
        ("model_options={widths: [8.5, 8, 8]}", "`widths` needs positive whole numbers"),
        ("model_options={depth: 28}", "to be among ['widths', 'blocks'], got 'depth'"),
        ("initial=0", "`switches.initial` to be above `switches.threshold`"),
        ("accumulate=100", "`schedule.accumulate` to be at most `schedule.batch`"),
        ("betta=1", "got 'betta'. Hint: beta? (From -s betta.)"),
        ("epochs", "overrides like name=value, got 'epochs'"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(overrides=[override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_numbers_and_texts() -> None:
    config = load_config(overrides=["lr_switch=1e-3", "beta=1", "root=2024", "domains=[1, b]"])
    assert (config.optimiser.lr_switch, config.budget.beta, config.data.root, config.data.domains) == (
        1e-3,
        1.0,
        "2024",
        ["1", "b"],
    )
    assert type(config.budget.beta) is float


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"beta: [", "to be YAML"),
        (b"- beta", "to hold names and values, got list"),
        (b"", "to hold names and values, got NoneType"),
        (b"beta: 0.5\nepochs: 3\nbeta: 0.25\n", "'beta' is set twice"),
        (b"\xff\xfe\x00beta", "to be a YAML file"),
        (b"!!python/object/apply:os.system [ls]", "to be YAML"),
        (b"1: 2", "got 1."),
        (b"beta: 2", "`budget.beta` to be less than or equal to 1, got 2. (From "),
        (b"[" * 600, "to be YAML"),
    ],
)
def test_invalid_settings_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    for other in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ValueError, match="to be a YAML file, got"):
            load_config(other)


def test_replacing_a_setting_checks_it() -> None:
    config = Config()
    with pytest.raises(ValueError, match=r"Config\(\): expected `budget.beta` to be less than or equal to 1, got 3"):
        config.replace(beta=3)
    with pytest.raises(ValueError, match=r"expected `schedule.epochs` to be a valid integer, got '3'"):
        Config(epochs="3")


def test_every_setting_has_one_short_name() -> None:
    assert sorted(SHORT_NAMES.values()) == sorted(Config().by_name())
    for short, name in SHORT_NAMES.items():
        group, own = name.split(".")
        value = Config().by_name()[name]
        settings = ({short: value}, {name: value}, {group: {own: value}})
        assert [full_names(one) for one in settings] == [{name: value}] * 3


def test_full_and_short_names_are_equivalent(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("data: decathlon\nroot: there\nschedule: cosine\nsharing: int\nsettle: 0.5\n")
    (tmp_path / "groups.yaml").write_text(
        "data: {suite: decathlon, root: there}\nschedule: {decay: cosine}\nsharing: {loss: int}\n"
        "switches.freeze_at: 0.5\n"
    )
    short, groups = (load_config(tmp_path / f"{name}.yaml", ["beta=0.25"]) for name in ("short", "groups"))
    assert short == groups
    assert short == load_config(tmp_path / "short.yaml", ["budget.beta=1", "budget={beta: 0.25}"])
    assert Config(**short.as_dict()) == Config(**short.by_name()) == short
    assert config_of(known_settings({**short.as_dict(), "of_the_future": 1}), "a file") == short


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0.5, "budget": {"beta": 0.25}}, "each setting once, got 'budget.beta' twice"),
        ({"budget": {"betta": 0.25}}, "got 'budget.betta'. Hint: budget.beta?"),
        ({"budget": 0.5}, "got 'budget'. Hint: budget is a group of settings."),
        ({"xyzzy": 0}, "got 'xyzzy'. Hint: the groups are data, model, switches, "),
    ],
)
def test_unknown_and_repeated_names_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Config(**values)
    assert message in str(caught.value)


def test_the_old_name_of_the_builtin_suite() -> None:
    with pytest.warns(DeprecationWarning, match="its name is 'builtin'"):
        assert Config(data="embedded") == Config()
