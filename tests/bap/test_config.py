"""Settings are refused when they are read: types, bounds, unknown names, files that are no YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from bap.config import Config, load_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("beta=.nan", "`beta` to be a finite number, got nan"),
        ("beta=.inf", "`beta` to be a finite number, got inf"),
        ("beta=0", "`beta` to be greater than 0, got 0"),
        ("beta=true", "`beta` to be a valid number, got True"),
        ("beta=", "`beta` to be a valid number, got None"),
        ("beta='half'", "`beta` to be a valid number, got 'half'"),
        ("beta=[0.5", "the value of 'beta=[0.5' to be YAML"),
        ("beta=@", "the value of 'beta=@' to be YAML"),
        ("settle=1.1", "`settle` to be less than or equal to 1, got 1.1"),
        *((f"{name}=-0.001", f"`{name}` to be greater than or equal to 0, got -0.001")
          for name in ("lr_switch", "lr_norm", "lr_head", "lr_backbone", "pretrain_lr", "weight_decay")),
        ("lr_head=.nan", "`lr_head` to be a finite number, got nan"),
        ("momentum=1", "`momentum` to be less than 1, got 1"),
        ("temperature=0", "`temperature` to be greater than 0, got 0"),
        ("epochs=1.5", "`epochs` to be a valid integer, got 1.5"),
        ("epochs=0", "`epochs` to be greater than or equal to 1, got 0"),
        ("epochs=true", "`epochs` to be a valid integer, got True"),
        ("seed=-1", "`seed` to be greater than or equal to 0, got -1"),
        ("workers=-1", "`workers` to be greater than or equal to 0, got -1"),
        ("threads=0", "`threads` to be greater than or equal to 1, got 0"),
        ("size=4", "`size` to be greater than or equal to 8, got 4"),
        ("full=1", "`full` to be a valid boolean, got 1"),
        ("domains=digits", "`domains` to be a valid list, got 'digits'"),
        ("domains=[[a]]", "`domains[0]` to be a valid string, got [['a']]"),
        ("domains=[a, a]", "`domains` to name each domain once"),
        ("device=gpu", "`device` to be 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        ("backend=fast", "`backend` to be one of [None, 'auto'"),
        ("sharing=none", "`sharing` to be one of [None, 'int', 'union', 'jaccard'], got 'none'"),
        ("model=[]", "`model` to be one of ['resnet26'"),
        ("model_options=[1]", "`model_options` to be a valid dictionary, got [1]"),
        ("model_options={widths: [8, 8]}", "`model_options` to make a 'resnet26'"),
        ("model_options={widths: [8.5, 8, 8]}", "`widths` needs positive whole numbers"),
        ("model_options={depth: 28}", "to be among ['widths', 'blocks'], got 'depth'"),
        ("initial=0", "`initial` to be above `threshold`"),
        ("accumulate=100", "`accumulate` to be at most `batch`"),
        ("betta=1", "got 'betta' in -s betta. Hint: beta?"),
        ("epochs", "overrides like name=value, got 'epochs'"),
    ],
)  # fmt: skip
def test_values_are_refused_with_their_name_and_rule(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(overrides=[override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_numbers_are_read_as_they_look() -> None:
    config = load_config(overrides=["lr_switch=1e-3", "beta=1", "root=2024", "domains=[1, b]"])
    assert (config.lr_switch, config.beta, config.root, config.domains) == (1e-3, 1.0, "2024", ["1", "b"])
    assert type(config.beta) is float


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"beta: [", "to be YAML"),
        (b"- beta", "to hold names and values, got list"),
        (b"", "to hold names and values, got NoneType"),
        (b"beta: 0.5\nepochs: 3\nbeta: 0.25\n", "'beta' is set twice"),
        (b"\xff\xfe\x00beta", "to be a YAML file"),
        (b"!!python/object/apply:os.system [ls]", "to be YAML"),
        (b"1: 2", "got 1 in"),
        (b"beta: 2", "`beta` to be less than or equal to 1, got 2. (From "),
        (b"[" * 600, "to be YAML"),
    ],
)
def test_files_that_are_no_settings_are_named(content: bytes, message: str, tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match=r"Config\(\): expected `beta` to be less than or equal to 1, got 3"):
        dataclasses.replace(config, beta=3)
    with pytest.raises(ValueError, match="expected `epochs` to be a valid integer, got '3'"):
        Config(epochs="3")
