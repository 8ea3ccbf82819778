"""The work folder: names, rows in parts, manifests that refuse to mix."""

import json
import multiprocessing

import datasets
import pytest

from data_scripts.dad.row_parts import RowParts
from data_scripts.dad.stage_folders import (
    WorkFolder,
    begin_stage,
    digest,
    image_path,
    read_finished,
    read_stage_rows,
    shard_name,
)
from mra.common.files import write_whole
from mra.common.sharding import Shard
from tests.helpers.dad import load_config


def configure(tmp_path, *overrides):
    return load_config(None, [f"--common.work_dir={tmp_path}", "--common.dataset=pedes", *overrides])


def finish(config, *stages):
    for stage in stages:
        begin_stage(config, stage).finish(rows=1)


def test_names_follow_the_published_layout():
    assert [shard_name(number, "sda") for number in (0, 4999, 5000)] == ["sda_0_5000", "sda_0_5000", "sda_5000_10000"]
    assert image_path(12345) == "c_10000_15000/12345.jpg"


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_whole(path, "one")
    write_whole(path, b"two")
    assert path.read_text() == "two" and [item.name for item in path.parent.iterdir()] == ["b.txt"]


def test_parts_of_any_number_of_processes_merge_to_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    for world in (1, 3):
        for rank in range(world):
            parts = RowParts(path, Shard(rank, world))
            parts.append([{"prompt_id": 10 * world + rank, "text": "é"}])
            parts.close()
    parts = RowParts(path, Shard())
    assert sorted(parts.read()) == [10, 30, 31, 32]
    assert parts.merge() == 4 and [item.name for item in tmp_path.iterdir()] == ["rows.jsonl"]
    assert [json.loads(line)["prompt_id"] for line in path.read_text().splitlines()] == [10, 30, 31, 32]
    before = path.read_bytes()
    assert parts.merge() == 4 and path.read_bytes() == before


def test_a_line_that_a_killed_process_left_unfinished_is_cut(tmp_path):
    part = tmp_path / "rows-00000-of-00001.jsonl"
    part.write_text('{"prompt_id": 1}\n{"prompt_id": 2, "te')
    parts = RowParts(tmp_path / "rows.jsonl", Shard())
    assert list(parts.read()) == [1]
    parts.append([{"prompt_id": 2}])
    parts.close()
    assert part.read_text() == '{"prompt_id": 1}\n{"prompt_id": 2}\n'


def _append_or_fail(path):
    with pytest.raises(ValueError, match="another run is writing it"):
        RowParts(path, Shard()).append([{"prompt_id": 2}])


def test_two_runs_do_not_write_one_part(tmp_path):
    parts = RowParts(tmp_path / "rows.jsonl", Shard())
    parts.append([{"prompt_id": 1}])
    list(parts.read())  # reading closes the file once, which must not end the lock
    other = multiprocessing.get_context("fork").Process(target=_append_or_fail, args=(tmp_path / "rows.jsonl",))
    other.start()
    other.join()
    assert other.exitcode == 0
    parts.close()
    assert list(parts.read()) == [1]


def test_a_stage_is_not_continued_with_other_settings(tmp_path):
    config = configure(tmp_path)
    assert not begin_stage(config, "augment").is_finished
    assert not begin_stage(config, "augment").is_finished
    (tmp_path / "prompts" / "prompts.jsonl.unfinished").touch()
    config.augment.strength = 0.25
    with pytest.raises(ValueError, match=r"augment\.strength \(0\.5 then, 0\.25 now\)"):
        begin_stage(config, "augment")


def test_a_stage_that_made_nothing_is_begun_anew(tmp_path):
    """A mistyped model ends the stage at once; the right one must not be refused then."""
    finish(configure(tmp_path), "train", "augment", "generate", "filter")
    begin_stage(configure(tmp_path, "--caption.model=blpi"), "caption")
    assert (
        begin_stage(configure(tmp_path, "--caption.model=blip"), "caption").manifest["settings"]["caption.model"]
        == "blip"
    )
    with pytest.raises(ValueError, match=r"caption\.model"):  # another job may be at work
        begin_stage(configure(tmp_path, "--caption.model=git", "--common.shard=1/2"), "caption")
    begin_stage(configure(tmp_path, "--caption.model=blip"), "caption").finish(captions=0)
    with pytest.raises(ValueError, match=r"caption\.model"):
        begin_stage(configure(tmp_path, "--caption.model=git"), "caption")


def test_settings_that_decide_nothing_may_change(tmp_path):
    finish(configure(tmp_path), "train")
    assert begin_stage(configure(tmp_path, "--train.num_workers=0", "--train.save_steps=7"), "train").is_finished


def test_a_stage_waits_for_those_it_is_made_from(tmp_path):
    config = configure(tmp_path)
    begin_stage(config, "train")
    with pytest.raises(ValueError, match="stage 'train' is unfinished"):
        begin_stage(config, "generate")
    finish(config, "train")
    with pytest.raises(ValueError, match="stage 'augment' was not run"):
        begin_stage(config, "generate")
    finish(config, "augment")
    assert set(begin_stage(config, "generate").manifest["made_from"]) == {"train", "augment"}


def test_a_stage_is_not_mixed_from_two_results(tmp_path):
    config = configure(tmp_path)
    finish(config, "train", "augment", "generate")
    (WorkFolder(tmp_path).folder("augment") / "manifest.json").unlink()
    config.augment.strength = 0.25
    finish(config, "augment")
    with pytest.raises(ValueError, match="made from results of augment"):
        begin_stage(config, "generate")


def test_a_broken_row_is_named(tmp_path):
    path = tmp_path / "images" / "generated.jsonl"
    whole = {"file_path": "c_0_5000/0.jpg", "prompt_id": 0, "prompt": "a man"}
    for line, said in (
        ('{"file_path": "c_0', "line 2 is not a JSON object"),
        ('{"prompt_id": 1}', "line 2 has no 'file_path'"),
    ):
        write_whole(path, json.dumps(whole) + "\n" + line + "\n")
        with pytest.raises(
            ValueError, match=rf"generated\.jsonl: {said}.*remove {path.parent} and run its stage again"
        ):
            read_stage_rows(path)


def test_another_controlnet_needs_no_training(tmp_path):
    config = configure(tmp_path, "--generate.controlnet=user/controlnet")
    finish(config, "augment")
    assert set(begin_stage(config, "generate").manifest["made_from"]) == {"augment"}


def test_a_digest_follows_the_settings_up_the_line(tmp_path):
    digests = []
    for name, strength in (("a", 0.5), ("b", 0.25), ("c", 0.5)):
        config = configure(tmp_path / name, f"--augment.strength={strength}")
        finish(config, "train", "augment", "generate")
        digests.append(digest(read_finished(WorkFolder(tmp_path / name), "generate")))
    assert digests[0] == digests[2] != digests[1]


def test_jobs_apart_have_shares_of_their_own(tmp_path):
    finish(configure(tmp_path), "train", "augment")
    config = configure(tmp_path, "--common.shard=2/3")
    assert begin_stage(config, "generate").shard == Shard(2, 3)
    assert begin_stage(config, "augment", splits=False).is_finished
    with pytest.raises(ValueError, match="cannot be shared between jobs"):
        begin_stage(configure(tmp_path / "new", "--common.shard=0/2"), "augment", splits=False)


def test_a_stage_is_complete_once_no_row_is_missing(tmp_path):
    finish(configure(tmp_path), "train", "augment")
    for job, complete in ((0, False), (1, True)):
        stage = begin_stage(configure(tmp_path, f"--common.shard={job}/2"), "generate")
        rows = stage.rows(stage.work.generated)
        rows.append([{"prompt_id": job}])
        assert stage.finish_rows(rows, expected=2, name="images") is complete
    assert read_finished(WorkFolder(tmp_path), "generate")["finished"] == {"images": 2}


def test_a_stage_is_not_continued_with_other_rows_of_the_target_set(tmp_path):
    def write(folder, digest):
        shard = folder / f"data/train-00000-of-00001-{digest}.parquet"
        shard.parent.mkdir(parents=True)
        datasets.Dataset.from_dict({"image_id": [1, 2]}).to_parquet(shard)

    write(tmp_path / "one/set", "0" * 16)
    write(tmp_path / "moved/set", "0" * 16)
    write(tmp_path / "other/set", "1" * 16)
    before, after = (configure(tmp_path / "work", f"--common.dataset={tmp_path / 'set'}") for _ in range(2))
    (tmp_path / "set").symlink_to(tmp_path / "one/set")
    begin_stage(before, "augment").finish(rows=1)
    for folder in ("moved", "one"):
        (tmp_path / "set").unlink()
        (tmp_path / "set").symlink_to(tmp_path / folder / "set")
        assert begin_stage(after, "augment").is_finished
    (tmp_path / "set").unlink()
    (tmp_path / "set").symlink_to(tmp_path / "other/set")
    with pytest.raises(ValueError, match="started with other settings: files of common"):
        begin_stage(after, "augment")


def test_a_damaged_manifest_or_row_is_named(tmp_path):
    config = configure(tmp_path)
    begin_stage(config, "augment").finish(rows=1)
    manifest = tmp_path / "prompts/manifest.json"
    manifest.write_text("{")
    with pytest.raises(ValueError, match=f"{manifest} cannot be read"):
        begin_stage(config, "augment")
    part = tmp_path / "rows.jsonl"
    part.write_bytes(b'{"prompt_id": 1}\n{"prompt\n')
    with pytest.raises(ValueError, match=f"{part}: line 2 is not JSON"):
        RowParts(part, Shard(0, 1)).read()
