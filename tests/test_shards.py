"""Tars as folders: the same clips, read where they lie."""
import functools
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import common
import data
import probe
import retrieval
import visualize
from conftest import CPU, INPUTS, ROOT, fails, names, same, write_checkpoint
from datasets import files as folders
from datasets import shards
from test_datasets import HERE, LAYOUTS, contents, lines, put


def pack(path, members, form=tarfile.PAX_FORMAT):
    """A tar of {name: bytes, or (type, what a link leads to)} by tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                tar.addfile(member)
    return path


def pack_by_tar(path, members):
    """The same of files alone by the program tar, which writes folders and "./" too."""
    folder = path.parent / "unpacked"
    put(folder, members)
    subprocess.run(["tar", "-cf", path, "-C", folder, "."], check=True)
    subprocess.run(["rm", "-r", folder], check=True)


PACKERS = {"tar": pack_by_tar, "pax": pack, "gnu": functools.partial(pack, form=tarfile.GNU_FORMAT)}


def content_at(path):
    """The bytes of a clip, be it in a tar or not."""
    tar, offset, size = shards.find_address(path) or (path, 0, -1)
    with open(tar, "rb") as file:
        file.seek(offset)
        return file.read(size)


def said(listing):
    """All that is known of a listing but where its clips lie."""
    held = None if listing.held is None else listing.held.tolist()
    fold = None if listing.fold is None else listing.fold.tolist()
    return data.describe(listing), listing.classes, list(contents(listing).items()), held, fold


def write_layout(layout, folder):
    """The lists as files, and {path: bytes} of the clips that lie below the folder."""
    clips = {}
    files = dict(layout.files)
    for rows in layout.rows.values():
        files |= dict.fromkeys(rows, "")
    for path, text in files.items():
        if folders.is_media(path) and not path.startswith(HERE):
            clips[path] = f"the clip {path}".encode()
        else:
            put(folder, {path: text})
    return clips


@pytest.mark.parametrize("case", LAYOUTS)
def test_tars_are_listed_like_the_unpacked_folder(tmp_path, case):
    """By any program, with all clips in one tar or in three; the bytes at each address are the file's; a
    subset and both splits together keep the places."""
    layout = LAYOUTS[case]
    folder = tmp_path / "set"
    folder.mkdir()
    clips = write_layout(layout, folder)
    put(folder, clips)
    splits = [*layout.rows, *["all"] * ("test" in layout.rows and "all" not in layout.rows)]
    expected = {split: said(data.list_clips(layout.name, folder, split)) for split in splits}
    for path in clips:
        (folder / path).unlink()
    for place in sorted(folder.glob("**/"), reverse=True):      # nor are the folders there
        if not any(place.iterdir()):
            place.rmdir()
    folder.mkdir(exist_ok=True)
    for packer, count in (("tar", 1), ("pax", 3), ("gnu", 3)):
        for number in range(count):
            part = {path: clips[path] for path in sorted(clips)[number::count]}
            if part:
                PACKERS[packer](folder / f"{number}.tar", part)
        for split in splits:
            listing = data.list_clips(layout.name, folder, split)
            assert said(listing) == expected[split], packer
            turned = listing.subset(np.arange(len(listing))[::-1])
            for i, file in enumerate(names(listing)):
                if not os.path.isabs(file):
                    assert content_at(listing.path(i)) == clips[file]
                    assert listing.path(i).endswith("/" + file)
                assert turned.path(len(listing) - 1 - i) == listing.path(i)
        for tar in folder.glob("*.tar*"):
            tar.unlink()


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_lists_of_a_set_are_all_that_it_needs_beside_its_clips(tmp_path, case):
    layout = LAYOUTS[case]
    clips = write_layout(layout, tmp_path)
    whole = put(tmp_path, clips)
    less = tmp_path.parent / f"{tmp_path.name} less"
    put(less, clips)
    for pattern in data.SETS[layout.name].lists:
        for path in whole.glob(pattern):
            put(less, {str(path.relative_to(whole)): path.read_bytes()})
    for split in layout.rows:
        listing = data.list_clips(layout.name, less, split)
        assert contents(listing) == contents(data.list_clips(layout.name, whole, split))


def test_a_tar_lies_in_a_folder_as_its_members_would(tmp_path):
    put(tmp_path, {"train/cat/1.mp4": b"1"})
    pack(tmp_path / "train" / "x.tar", {"./dog//2.mp4": b"22", "./dog/": (tarfile.DIRTYPE, "")})
    pack(tmp_path / "test" / "dog" / "y.TAR", {"3.mp4": b"333"})
    train = data.list_clips("folder", tmp_path)
    assert contents(train) == {"train/cat/1.mp4": "cat", "train/dog/2.mp4": "dog"}
    assert train.path(0) == f"{tmp_path}/train/cat/1.mp4" and train.places[0].tolist() == [-1, 0, 0]
    test = data.list_clips("folder", tmp_path, "test")
    assert contents(test) == {"test/dog/3.mp4": "dog"} and content_at(test.path(0)) == b"333"


def test_splits_in_tars_of_their_own_are_joined(tmp_path):
    put(tmp_path, LAYOUTS["FSD50K"].files)
    for part, name in (("dev", "100.wav"), ("eval", "200.wav")):
        pack(tmp_path / f"FSD50K.{part}_audio" / "0.tar", {name: name.encode()})
    put(tmp_path, {"FSD50K.dev_audio/102.wav": "102.wav"})
    both = data.list_clips("fsd50k", tmp_path, "all")
    assert [content_at(both.path(i)) for i in range(3)] == [b"100.wav", b"102.wav", b"200.wav"]
    assert names(both.subset([2, 0])) == ["FSD50K.eval_audio/200.wav", "FSD50K.dev_audio/100.wav"]
    put(tmp_path / "plain", LAYOUTS["FSD50K"].files | {"FSD50K.dev_audio/100.wav": "1"})
    pack(tmp_path / "plain" / "FSD50K.eval_audio" / "0.tar", {"200.wav": b"2"})
    both = data.list_clips("fsd50k", tmp_path / "plain", "all")
    assert [content_at(both.path(i)) for i in range(2)] == [b"1", b"2"]


def test_the_clips_of_webdataset_are_found_by_their_keys(tmp_path):
    for shard in range(2):
        members = {}
        for n in range(3):
            members[f"00000{shard}{n}.mp4"] = b"clip %d%d" % (shard, n)
            members[f"00000{shard}{n}.json"] = json.dumps({"label": n}).encode()
            members[f"00000{shard}{n}.wav"] = b"its sound"
        pack(tmp_path / f"{{{shard}}}.tar", members)
    put(tmp_path, {"train.csv": lines("0000012.mp4,dog", "0000000.mp4,cat", "0000009.mp4,cat"),
                   "test.csv": "0000001.mp4,cat\n"})
    listing = data.list_clips("vggsound", tmp_path)
    assert contents(listing) == {"0000012.mp4": "dog", "0000000.mp4": "cat"} and listing.missing == 1
    assert [content_at(listing.path(i)) for i in range(2)] == [b"clip 12", b"clip 00"]
    plain = data.describe(data.list_clips("folder", tmp_path))
    assert plain.startswith("folder: 6 clips found (no sub-folders, so no labels; left out: 6 .json, 2 .csv")
    assert "6 sounds beside pictures of the same name in a tar: '0000000.wav', " in plain


# --- The same listing of a set whose clips have become .mp4 and .wav ---

def prepared(files):
    """{file: what it has become}: another ending, or one more where two differ by that alone."""
    stems = [os.path.splitext(file)[0] for file in files]
    out = {}
    for file, stem in zip(files, stems):
        ending = ".wav" if file.endswith(("wav", "flac")) else ".mp4"
        out[file] = (file if stems.count(stem) > 1 else stem) + ending
    return out


def test_a_folder_of_other_endings_has_the_same_order_and_the_same_splits(tmp_path):
    files = []
    for stem in ("1", "1-2", "1 b", "2", "2.b", "3", "4"):
        files += [f"a/{stem}.avi", f"b/{stem}.avi"]
    files += ["a/1.mp4", "a/5.avi", "a/5.mp4", "a/5.flac"]
    become = prepared(files)
    assert become["a/1.mp4"] == "a/1.mp4.mp4" and become["a/5.flac"] == "a/5.flac.wav"
    put(tmp_path / "raw", dict.fromkeys(files, ""))
    put(tmp_path / "files", dict.fromkeys(become.values(), ""))
    pack(tmp_path / "tar" / "0.tar", {file: file.encode() for file in become.values()})
    for split in ("train", "test", "all"):
        raw = data.list_clips("folder", tmp_path / "raw", split)
        for place in ("files", "tar"):
            other = data.list_clips("folder", tmp_path / place, split)
            assert names(other) == [become[file] for file in names(raw)]
            assert split == "all" or other.labels.tolist() == raw.labels.tolist()


def test_a_list_of_paths_finds_what_they_have_become(tmp_path):
    become = prepared(["x/a.webm", "x/b.avi", "x/b.mp4", "c.mp4"])
    rows = lines(*[f"{file} {n}" for n, file in enumerate(become)])
    put(tmp_path / "raw", dict.fromkeys(become, "") | {"train.csv": rows})
    put(tmp_path / "mp4", dict.fromkeys(become.values(), "") | {"train.csv": rows})
    assert names(data.list_clips("kinetics400", tmp_path / "raw")) == list(become)
    assert names(data.list_clips("kinetics400", tmp_path / "mp4")) == list(become.values())


# --- What may lie in a tar ---

def test_what_is_no_clip_in_a_tar_is_left_out_and_said(tmp_path):
    put(tmp_path, {"real.mp4": "real"})
    pack(tmp_path / "1.tar", {
        "real.mp4": b"copy", "a.mp4": b"a", "/etc/b.mp4": b"", "../c.mp4": b"", "x/../../d.mp4": b"",
        "._a.mp4": b"", "__MACOSX/x/1.mp4": b"", "__MACOSX/x/2.mp4": b"", "e.txt": b"", "LICENSE": b"",
        "pipe.mp4": (tarfile.FIFOTYPE, ""), "gone.mp4": (tarfile.SYMTYPE, "nowhere.mp4")})
    pack(tmp_path / "2.tar", {"a.mp4": b"later", "b.mp4": b"b"})
    put(tmp_path, {"3.tar": b"no tar", "4.tar": b"", "5.tar.gz": b"", "6.tgz": b"", "sub/7.Tar.Zst": b"",
                   "8.gz": b""})
    (tmp_path / "9.tar").symlink_to("2.tar")
    listing = data.list_clips("folder", tmp_path)
    assert names(listing) == ["a.mp4", "b.mp4", "real.mp4"]
    assert [content_at(listing.path(i)) for i in range(3)] == [b"a", b"b", b"real"]
    assert listing.notes == (
        "no sub-folders, so no labels", "2 tars not readable, or not to the end: '3.tar', '4.tar'",
        "3 compressed tars: '5.tar.gz', '6.tgz', 'sub/7.Tar.Zst'; unpack it, or gunzip it: a compressed tar "
        "cannot be read in any order",
        "left out: 1 .gz, 1 .txt, 1 without an ending, 2 hidden or system names: '._a.mp4', '__MACOSX', "
        "2 broken or no file: 'gone.mp4', 'pipe.mp4', "
        "1 link to a folder or tar that is here already: '9.tar', "
        "2 clips of a tar, here already: 'real.mp4', 'a.mp4', "
        "3 names in a tar, leading out of it: '/etc/b.mp4', '../c.mp4', 'x/../../d.mp4'")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_length_and_bytes_are_those_of_the_files(tmp_path, form):
    odd = (f"{'x' * 90}/{'y' * 200}.mp4", "two\nlines.mp4", "byte \udcff.mp4", "ünï.mp4",
           "a@1+2/b.mp4", "'.mp4")
    pack(tmp_path / "0.tar", {name: os.fsencode(name) for name in odd}, form)
    for _ in range(2):                                          # the second time by the index
        listing = data.list_clips("folder", tmp_path, "all")
        assert sorted(listing.file(i) for i in range(6)) == sorted(odd)
        assert all(content_at(listing.path(i)) == os.fsencode(listing.file(i)) for i in range(6))
        assert data.describe(listing).isprintable()


def test_of_two_members_with_one_name_the_last_counts_and_a_link_is_what_it_leads_to(tmp_path):
    pack(tmp_path / "0.tar", {
        "b/early.mp4": (tarfile.SYMTYPE, "../a/1.mp4"), "a/1.mp4": b"old", "./a/1.mp4": b"new",
        "b/hard.mp4": (tarfile.LNKTYPE, "a/1.mp4"), "b/2.mp4": b"2"})
    files = folders.scan(tmp_path)
    assert files == ["a/1.mp4", "b/2.mp4", "b/early.mp4", "b/hard.mp4"]
    assert len(set(files.inside.values())) == 2
    listing = data.list_clips("folder", tmp_path, "all")
    assert [content_at(listing.path(i)) for i in range(2)] == [b"new", b"2"] and len(listing) == 2
    assert "2 links to a clip that is here already: 'b/early.mp4', 'b/hard.mp4'" in data.describe(listing)


def test_a_tar_that_breaks_off_gives_what_lies_whole_in_it(tmp_path):
    members = {f"{n}.mp4": bytes(700) for n in range(4)}
    whole = pack(tmp_path / "whole.tar", members, tarfile.GNU_FORMAT).read_bytes()
    for length in (1, 511, *range(512, 6144, 300)):             # each has a header, and two blocks of content
        put(tmp_path / str(length), {"cut.tar": whole[:length]})
        files = folders.scan(tmp_path / str(length))
        count = length // 1536 + (length % 1536 >= 512 + 700)
        assert files == [f"{n}.mp4" for n in range(count)]
        assert files.damaged == ["cut.tar"] or length % 1536 == 0
        if length > 511:
            found = shards.read_members(tmp_path / str(length) / "cut.tar")
            assert found == [(f"{n}.mp4", 1536 * n + 512, 700) for n in range(count)]
        assert not list((tmp_path / str(length)).glob("*.index")) or length % 1536 == 0
    put(tmp_path / "x", {"damaged.tar": whole[:1536] + b"x" * 512 + whole[2048:]})
    files = folders.scan(tmp_path / "x")
    assert (files, files.damaged) == (["0.mp4"], ["damaged.tar"])
    assert "1 tar not readable, or not to the end: 'damaged.tar'" in files.trouble()


def test_a_header_that_lies_ends_what_is_read_of_a_tar(tmp_path):
    """A size below zero, which leads back to where it was read, and numbers that are none."""
    first = tarfile.TarInfo("a.mp4")
    back = bytearray(tarfile.TarInfo("b.mp4").tobuf(tarfile.GNU_FORMAT))
    back[124:136] = b"\xff" * 10 + b"\xfc\x00"                 # - 1,024
    back[148:156] = b"%06o\0 " % (sum(back[:148]) + sum(back[156:]) + 8 * 32)
    sparse = tarfile.TarInfo("b.mp4")
    sparse.pax_headers = {"GNU.sparse.map": "x,1"}
    for damaged in (back, sparse.tobuf(tarfile.PAX_FORMAT)):
        put(tmp_path, {"0.tar": first.tobuf() + damaged + bytes(1024)})
        files = folders.scan(tmp_path)
        assert (files, files.damaged) == (["a.mp4"], ["0.tar"])


def test_a_tar_of_any_damaged_bytes_ends_in_no_traceback(tmp_path):
    members = {f"{n}/{'x' * 60 * n}.mp4": bytes(600 * n) for n in range(5)}
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        whole = pack(tmp_path / "a" / "whole.tar", members, form).read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(random.choice((1, 5, 50))):
                at = random.randrange(len(whole)) // 512 * 512
                damaged[at + random.randrange(160)] = random.randrange(256)
                check = sum(damaged[at:at + 148]) + sum(damaged[at + 156:at + 512]) + 8 * 32
                damaged[at + 148:at + 156] = b"%06o\0 " % check         # else tarfile looks no further
            put(tmp_path, {"a/whole.tar": bytes(damaged)})
            (tmp_path / "a" / "whole.tar.index").unlink(missing_ok=True)
            files = folders.scan(tmp_path / "a")
            assert all(offset + size <= len(whole) for _, offset, size in files.inside.values())


# --- The index ---

@pytest.fixture()
def reads(monkeypatch):
    """The tars whose headers were read."""
    paths = []
    really = shards.read_headers

    def read(path):
        paths.append(os.path.basename(path))
        return really(path)

    monkeypatch.setattr(shards, "read_headers", read)
    return paths


def test_an_index_is_made_once_and_again_when_its_tar_has_changed(tmp_path, reads):
    for n in range(3):
        pack(tmp_path / f"{n}.tar", {f"{n}/a.mp4": b"a", f"{n}/b.mp4": b"b"})
    before = folders.scan(tmp_path)
    assert reads == ["0.tar", "1.tar", "2.tar"] and before.endings == {}
    again = folders.scan(tmp_path)
    assert len(reads) == 3 and (again, again.inside, again.endings) == (before, before.inside, {})
    with tarfile.open(tmp_path / "1.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("1/c.mp4"))
    assert len(folders.scan(tmp_path)) == 7 and reads[3:] == ["1.tar"]
    pack(tmp_path / "2.tar", {"2/a.mp4": b"b", "2/z.mp4": b"a"})    # of the same size
    assert "2/z.mp4" in folders.scan(tmp_path) and reads[4:] == ["2.tar"]
    pack(tmp_path / "2.tar", {"2/y.mp4": b"b", "2/z.mp4": b"a"})
    os.utime(tmp_path / "2.tar", (1, 1))                            # and older, as of a copy
    assert "2/y.mp4" in folders.scan(tmp_path) and reads[5:] == ["2.tar"]
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"\xff", b"null", b"[" * 10 ** 5, {}, {"members": None}, {"members": [["a.mp4", 512]]},
    {"members": [["a.mp4", 512, "1"]]}, {"members": [[1, 512, 1]]}, {"members": [["a.mp4", -512, 1]]},
    {"members": [["a.mp4", 512, -1]]}, {"members": [["a.mp4", 512, 10 ** 9]]},
    {"members": [["a.mp4", 5.5, 1]]}, {"members": [], "size": 1}, {"members": [], "size": None}])
def test_a_damaged_index_is_made_anew(tmp_path, reads, content):
    tar = pack(tmp_path / "0.tar", {"a.mp4": b"a"})
    if isinstance(content, dict):
        content = json.dumps(shards.stamp(tar) | content).encode()
    put(tmp_path, {"0.tar.index": content})
    for _ in range(2):
        assert content_at(data.list_clips("folder", tmp_path).path(0)) == b"a"
    assert reads == ["0.tar"]


def test_where_no_index_can_be_written_the_tar_is_read_each_time_and_nothing_is_left(tmp_path, reads):
    pack(tmp_path / "0.tar", {"a.mp4": b"a"})
    (tmp_path / "0.tar.index" / "x").mkdir(parents=True)        # as in a folder that is read-only
    assert len(folders.scan(tmp_path)) == len(folders.scan(tmp_path)) == 1
    assert reads == ["0.tar"] * 2 and {path.name for path in tmp_path.iterdir()} == {"0.tar", "0.tar.index"}


def test_processes_that_make_an_index_at_once_all_read_the_same(tmp_path):
    path = pack(tmp_path / "0.tar", {f"{n}.mp4": b"a" for n in range(3000)})
    code = "import sys; from datasets import shards; print(hash(tuple(shards.read_index(sys.argv[1]))))"
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    runs = [subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, env=env, stdout=subprocess.PIPE)
            for _ in range(4)]
    assert len({run.communicate()[0] for run in runs}) == 1 and all(run.returncode == 0 for run in runs)
    assert {file.name for file in tmp_path.iterdir()} == {"0.tar", "0.tar.index"}
    assert shards.load_index(path) == shards.read_members(path)


# --- Clips in tars, decoded ---

@pytest.fixture(scope="session")
def packed_clips(clips, tmp_path_factory):
    """The folder `clips` as one tar, with two classes."""
    folder = tmp_path_factory.mktemp("packed")
    for number, names_of_tar in enumerate((("good.mp4", "silent.mp4"), ("fast.mp4", "sound.flac"))):
        pack(folder / f"{number}.tar", {name: (clips / name).read_bytes() for name in names_of_tar})
    return folder


def test_batches_from_a_tar_are_those_from_the_folder_bit_for_bit(clips, packed_clips):
    chosen = ["fast.mp4", "good.mp4", "silent.mp4", "sound.flac"]
    unpacked = data.make_listing("unpacked", clips, chosen, None, [])
    packed = data.list_clips("folder", packed_clips)
    assert names(packed) == chosen
    plan = functools.partial(retrieval.random_views, 2, INPUTS)
    runs = []
    for listing, workers in ((unpacked, 0), (packed, 0), (packed, 2)):
        order = data.Batches(4, 2, 0, 0, 4)
        batches = list(data.train_loader(data.Clips(listing, INPUTS, plan), order, workers))
        for batch in batches:
            batch["empty"] = [text.split("/")[-1] for text in batch["empty"]]
        runs.append(batches)
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    assert not same(runs[0][0]["video"], runs[0][1]["video"])


def test_the_toy_world_is_listed_and_read_from_tars(toy, tmp_path):
    files = {str(path.relative_to(toy)): path.read_bytes() for path in toy.glob("*/*.mp4")}
    pack(tmp_path / "0.tar", files)
    for pattern in data.SETS["toy"].lists:
        put(tmp_path, {str(path.relative_to(toy)): path.read_bytes() for path in toy.glob(pattern)})
    for split in ("train", "test"):
        unpacked = data.list_clips("toy", toy, split)
        packed = data.list_clips("toy", tmp_path, split)
        assert said(packed) == said(unpacked) and content_at(packed.path(3)) == files[f"{split}/00003.mp4"]
    clips = [data.load_clip(one.path(0), INPUTS) for one in (unpacked, packed)]
    assert same(*clips)


def test_a_search_finds_clips_in_tars_and_takes_one_as_the_query(clips, packed_clips, tmp_path, capsys):
    encoder = common.load_encoder(write_checkpoint(tmp_path))
    asked = data.list_clips("folder", packed_clips).path(1)
    scores = []
    for query, folder in ((str(clips / "good.mp4"), clips), (asked, packed_clips)):
        _, best, _ = retrieval.query(encoder, query, str(folder), 10, 1, 0, CPU)
        found = {os.path.basename(path): score for score, path in best}
        scores.append({name: found[name] for name in ("good.mp4", "fast.mp4", "silent.mp4")})
    assert scores[0] == scores[1]
    assert all(data.is_clip(path) and path.startswith(f"{packed_clips}/") for _, path in best)
    gone = asked.replace(".tar@", ".x.tar@")
    fails(retrieval.query, encoder, gone, str(clips), 1, 1, 0, CPU, match="there is no such file")


def test_ids_name_clips_in_tars_and_what_files_have_become(packed_clips, tmp_path):
    listing = data.list_clips("folder", packed_clips)
    wanted = put(tmp_path, {"ids": "silent\nfast.avi\nsound.flac\n"}) / "ids"
    chosen = retrieval.choose(listing, str(wanted))
    assert names(chosen) == ["silent.mp4", "fast.mp4", "sound.flac"]
    assert chosen.path(1) == listing.path(0)


def test_features_of_clips_in_tars_are_those_of_the_files_under_the_same_names(clips, packed_clips, tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    found = []
    for folder in (clips, packed_clips):
        words = f"--ckpt {checkpoint} --data folder --data-dir {folder} --save-features {tmp_path}/f.npz"
        probe.main([*words.split(), "--views", "1", "--workers", "0", "--device", "cpu"])
        with np.load(tmp_path / "f.npz") as file:
            found.append(dict(file))
    assert found[0]["files"].tolist() == found[1]["files"].tolist() == ["fast.mp4", "good.mp4"]
    assert np.array_equal(found[0]["clip"], found[1]["clip"])


def test_the_attention_of_a_clip_in_a_tar_is_drawn(toy, tmp_path):
    pack(tmp_path / "0.tar", {"test/x/00003.mp4": (toy / "test" / "00003.mp4").read_bytes()})
    clip = data.list_clips("folder", tmp_path, "test").path(0)
    checkpoint = write_checkpoint(tmp_path / "run")
    words = f"attention --ckpt {checkpoint} --data folder --data-dir {tmp_path} --out {tmp_path / 'of-set'}"
    visualize.main([*words.split(), "--device", "cpu"])
    visualize.main(["attention", "--ckpt", str(checkpoint), "--clip", clip, "--device", "cpu"])
    assert (checkpoint / "attention-00003.png").exists() and (checkpoint / "attention-00003.mp4").exists()
    of_set = [f"attention-folder-0-00003.{end}" for end in ("mp4", "png")]
    assert sorted(path.name for path in (tmp_path / "of-set").iterdir()) == of_set
    other = clip.replace("0.tar", "1.tar")
    fails(visualize.main, ["attention", "--ckpt", str(checkpoint), "--clip", other], match="no such file")


def test_the_new_set_of_the_page_is_listed_from_files_and_from_tars(tmp_path):
    page = (ROOT / "DATA.md").read_text()
    scope = {}
    exec(re.search(r"```python\n(\"\"\"Birds.*?)```", page, re.DOTALL)[1], scope)
    rows = lines("file,species,part", "a/1.wav,owl,train", "a/2.wav,lark,train", "b/3.wav,owl,test",
                 "gone.wav,owl,train")
    put(tmp_path, {"list.csv": rows, "a/1.flac": "1"})
    pack(tmp_path / "0.tar", {"a/2.wav": b"2", "b/3.wav": b"3"})
    listing = scope["list_birds"](Path(tmp_path), "train")
    assert contents(listing) == {"a/1.flac": "owl", "a/2.wav": "lark"} and listing.missing == 1
    assert [content_at(listing.path(i)) for i in range(2)] == [b"1", b"2"]
