"""Settings: what is refused and how it is told, which source wins, and that nothing is lost on the way to disk."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from epic_ray.config import RunConfig, build_config, differences, dump_config, fingerprint, load_config
from epic_ray.errors import ConfigError

LEAST = {"model": {"architecture": "resnet18"}, "data": {"root": "photos"}}
CONFIGS = Path(__file__).resolve().parents[1] / "jobs" / "configs"
READY_MADE_RUNS = 3  # run files under jobs/configs: change it with them


def refused(**sections) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config(LEAST | sections, "run.yaml")
    return str(caught.value).splitlines()


def test_only_architecture_and_root_have_no_default():
    assert build_config(LEAST, "run.yaml").name == "photos-resnet18-epic"
    with pytest.raises(ConfigError) as caught:
        build_config({}, "run.yaml")
    assert str(caught.value).splitlines() == [
        "run.yaml: 2 wrong setting(s)",
        "  model.architecture: missing; set it in the run file or by --set model.architecture=...",
        "  data.root: missing; set it in the run file or by --set data.root=...",
    ]


def test_all_wrong_settings_are_told_at_once_with_path_and_nearest_key():
    lines = refused(
        model={"architectur": "resnet18", "architecture": "resnet18", "class_count": 0},
        fit={"sed": 1, "workers": "many", "prototypes_per_channel": {"round": 3, "end": "few"}},
        data={"root": "photos", "max_failed_fraction": 2},
        resources={"batchsize": 4},
        zebra=1,
    )
    assert lines[0] == "run.yaml: 9 wrong setting(s)"
    for line in (
        "  model.architectur: unknown setting; did you mean `architecture`?",
        "  model.class_count: input should be greater than or equal to 1, not 0",
        "  fit.sed: unknown setting; did you mean `seed`?",
        "  fit.workers: input should be 'auto', or input should be a valid integer, or input should be a valid list, "
        "not 'many'",
        "  fit.prototypes_per_channel.round: unknown setting; did you mean `rounds`?",
        "  fit.prototypes_per_channel.end: input should be a valid integer, not 'few'",
        "  data.max_failed_fraction: input should be less than or equal to 1, not 2",
        "  resources.batchsize: unknown setting; did you mean `batch_size`?",
    ):
        assert line in lines
    assert lines[-1].startswith("  zebra: unknown setting; known here: name, method, model, data, ")


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"fit": None}, "  fit: expected a mapping of settings, not None"),
        ({"name": "../elsewhere"}, "  name: string should match pattern"),
        ({"model": {"architecture": "x", "preprocessing": {"men": [0, 0, 0]}}}, "  model.preprocessing.men: unknown"),
        ({"fit": {"adam": {"learning_rate": float("nan")}}}, "  fit.adam.learning_rate: input should be a finite"),
        ({"resources": {"batch_size": 2.5}}, "  resources.batch_size: input should be 'auto', or input"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(sections, line):
    first, *findings = refused(**sections)
    assert first == "run.yaml: 1 wrong setting(s)"
    assert len(findings) == 1
    assert findings[0].startswith(line)


def test_contradictions_are_told_together_with_wrong_values():
    lines = refused(
        data={"root": "photos", "splits": {"val": "val"}},
        fit={"prototypes_per_channel": {"start": 5, "end": 6}, "seed": "x"},
    )
    assert lines[0] == "run.yaml: 3 wrong setting(s)"
    assert "  data.splits: has no `train`, the split that is fitted on; add it" in lines
    assert (
        "  fit.prototypes_per_channel: end (6) is above start (5): the number of prototypes falls; give both" in lines
    )


@pytest.mark.parametrize(
    "splits",
    [
        {"train": "a", "val": "a"},
        {"train": "a/", "val": "/a"},
        {"train": "./a", "val": "a"},
        {"train": "a", "val": "a/b"},
        {"train": ".", "val": "b"},
    ],
)
def test_images_that_are_fitted_on_and_held_out_are_refused(splits):
    assert refused(data={"root": "photos", "splits": splits})[1].endswith(
        "share a folder; held-out figures would mean nothing"
    )


def test_splits_side_by_side_are_no_contradiction():
    config = build_config(LEAST | {"data": {"root": "r", "splits": {"train": "a/b", "val": "a/bc", "more": "c"}}}, "x")
    assert config.held_out_split == "val"


@pytest.mark.parametrize("name", ["v/1", "", ".hidden", "two words"])
def test_a_split_name_that_is_no_file_name_is_refused(name):
    assert "is no split name" in refused(data={"root": "r", "splits": {"train": "a", name: "b"}})[1]


def test_set_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(LEAST | {"fit": {"seed": 7, "solver": "adam"}}), encoding="utf-8")
    assert load_config(file).fit.seed == 7
    config = load_config(file, ["fit.seed=8", "resources.batch_size=3"])
    assert (config.fit.seed, config.fit.solver, config.model.seed) == (8, "adam", 0)
    assert config.resources.batch_size == 3
    assert load_config(None, ["model.architecture=a", "data.root=b", "data.root=c"]).data.root == "c"


def test_set_takes_lists_and_mappings_and_reaches_below_auto():
    sets = ["model.architecture=a", "data.root=b", "data.splits={train: x, val: y}", "model.classes=[cat, dog]"]
    config = load_config(None, [*sets, "model.preprocessing.crop=[64, 32]"])
    assert config.data.splits == {"train": "x", "val": "y"}
    assert config.model.classes == ["cat", "dog"]
    assert config.model.preprocessing.overrides() == {"crop": [64, 32]}


@pytest.mark.parametrize("text", ["nothing", "a..b=1", "=1", "fit.seed={"])
def test_a_malformed_set_says_what_is_expected(text):
    with pytest.raises(ConfigError, match=r"^--set .*(expected a\.b=value|is no YAML)"):
        load_config(None, [text])


@pytest.mark.parametrize("written", ["1e-3", "0.001", "1.0e-3"])
def test_powers_of_ten_are_numbers_as_people_write_them(tmp_path, written):
    file = tmp_path / "run.yaml"
    text = f"model: {{architecture: a}}\ndata: {{root: b}}\nfit: {{adam: {{learning_rate: {written}}}}}\n"
    file.write_text(text, encoding="utf-8")
    assert load_config(file).fit.adam.learning_rate == 0.001
    assert load_config(file, [f"fit.adam.weight_decay={written}"]).fit.adam.weight_decay == 0.001


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"a: [", "cannot be read as YAML"), (b"\xff\xfe\xff", "cannot be read"), (b"- a\n- b", "not a list")],
)
def test_a_run_file_that_is_none_is_told(tmp_path, content, says):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_config(file)
    with pytest.raises(ConfigError, match=r"no such run file; `epic-ray init` writes one"):
        load_config(tmp_path / "absent.yaml")


def test_dumped_settings_load_to_the_same_settings(tmp_path):
    config = build_config(
        {
            "model": {
                "architecture": "pkg.mod:net",
                "source": "factory",
                "classes": ["Löwe", "no", "1"],
                "arguments": {"depth": 3, "widths": [1, 2]},
                "preprocessing": {"resize": [40, 30], "crop": 32, "mean": [0.5, 1e-7, 0.1]},
            },
            "data": {"root": "Bilder mit Ümläuten/ordner", "splits": {"train": "t", "test": "s"}},
            "fit": {"workers": 2, "adam": {"learning_rate": 1e-9}},
        },
        "x",
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config
    assert config.held_out_split is None


def test_differences_name_the_settings_old_and_new():
    old = build_config(LEAST, "x")
    new = build_config(LEAST | {"fit": {"seed": 1}, "data": {"root": "photos", "splits": {"train": "t"}}}, "x")
    assert differences(old, old) == []
    assert differences(old, new) == [
        "data.splits.train: 'train' -> 't'",
        "data.splits.val: 'val' -> None",
        "fit.seed: 42 -> 1",
    ]


def test_fingerprints_depend_on_values_not_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(1), fingerprint("1"), fingerprint([1]), fingerprint(1, 1)}) == 4


def test_settings_cannot_be_changed_after_they_were_checked():
    with pytest.raises(ValidationError):
        build_config(LEAST, "x").fit.seed = 3


def test_every_setting_is_described_in_the_json_schema():
    schema = RunConfig.model_json_schema()
    sections = {"RunConfig": schema} | schema["$defs"]
    fields = {
        f"{section}.{key}": about for section, its in sections.items() for key, about in its["properties"].items()
    }
    assert len(fields) > 45
    # a setting that is a section may have its description there
    said = {name: about | sections.get(about.get("$ref", "").rsplit("/", 1)[-1], {}) for name, about in fields.items()}
    assert [name for name, about in said.items() if not about.get("description")] == []
    assert [section for section, its in sections.items() if not its.get("description")] == []


def test_every_ready_made_run_file_loads():
    files = sorted(CONFIGS.glob("**/*.yaml")) if CONFIGS.exists() else []
    assert len(files) == READY_MADE_RUNS
    names = [load_config(file).name for file in files]
    assert len(set(names)) == len(names)
