"""Patches and their order, the decoder, what it is compared with, what predictors imagine, the command."""
import itertools
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

import ajepa
import avjepa_ncsu
import common
import data
import mjepa
import pixels
from common import UserError
from conftest import ROOT, command, write_checkpoint

SHAPES = {"video": (3, 4, 16, 16), "audio": (1, 12, 21)}
GRIDS = {"video": (2, 4, 4), "audio": (3, 5)}           # 32 and 15 patches
SIDES = {"video": (2, 4, 4), "audio": (4, 4)}
SIZES = [32, 15]
SCRIPTS = {"ajepa": ajepa, "mjepa": mjepa, "avjepa_ncsu": avjepa_ncsu}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- patches -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m", SHAPES)
def test_patches_and_their_pixels_stand_as_in_the_convolution_of_the_encoder(m):
    encoder = common.ViT("nano", **{m: dict(shape=SHAPES[m][1:], patch=SIDES[m])})
    x = random(2, *SHAPES[m])
    zeros = torch.zeros_like(x)
    with torch.no_grad():
        expected = encoder.embed(**{m: x}) - encoder.embed(**{m: zeros})  # without bias and positions
    weight = next(p for p in encoder.parameters() if p.ndim == 2 + len(SIDES[m]))       # of the convolution
    got = pixels.patchify(x, SIDES[m]) @ weight.flatten(1).T
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("m", SHAPES)
def test_unpatchify_inverts_patchify_but_for_what_is_cut_off(m):
    x = random(2, *SHAPES[m])
    back = pixels.unpatchify(pixels.patchify(x, SIDES[m]), GRIDS[m], SIDES[m])
    whole = tuple(slice(n * side) for n, side in zip(GRIDS[m], SIDES[m]))
    assert torch.equal(back, x[(..., *whole)]) and back.shape[-1] == {"video": 16, "audio": 20}[m]


# ---- the decoder and what it is compared with ----------------------------------------------------------

def test_the_decoder_restores_a_planted_pattern_where_it_is_visible():
    """Each patch is one of eight patterns, its token a fixed linear map of it, or zero where it is hidden."""
    pattern = {}
    to_token = {}
    for m in GRIDS:
        pattern[m] = random(8, math.prod(SIDES[m]) * SHAPES[m][0], seed=1)
        to_token[m] = random(pattern[m].shape[1], 48, seed=2)
    decoder = pixels.PixelDecoder(48, GRIDS, SIDES, 64)
    has = torch.ones(8, dtype=torch.bool)

    def decode(batch, step):
        generator = torch.Generator().manual_seed(1000 + step)
        truth = {m: pattern[m][torch.randint(8, (8, n), generator=generator)] for m, n in zip(GRIDS, SIZES)}
        hidden = torch.rand(8, 47, generator=generator) < 0.3
        tokens = torch.cat([truth[m] @ to_token[m] for m in GRIDS], 1) * ~hidden[..., None]
        decoded = decoder(tokens, hidden)
        parts = dict(zip(GRIDS, hidden.split(SIZES, 1)))
        return {m: pixels.Decoded(decoded[m], truth[m], parts[m], has) for m in GRIDS}

    batch = dict(index=torch.arange(8), has_video=has, has_audio=has, short=~has, bad=[], lost=0)
    mean = pixels.train_decoder(decode, decoder.parameters(), [batch] * 250, 250, 3e-3, data.Troubles(8))
    errors, _, _ = pixels.pixel_errors(decode, [batch], mean, GRIDS, 250)
    for e in errors["visible"].values():
        assert e["decoder"] < 0.05 * e["mean"] and e["mean"] > 0.5


def test_apart_a_hidden_patch_is_decoded_from_predicted_tokens_alone_and_a_visible_one_from_visible_ones():
    hidden = random(2, 47) < 0
    tokens = random(2, 47, 16)
    noise = random(2, 47, 16, seed=1)
    for apart in (True, False):
        decoder = pixels.PixelDecoder(16, GRIDS, SIDES, 128, apart)
        as_is = decoder(tokens, hidden)
        other_visible = decoder(torch.where(hidden[..., None], tokens, noise), hidden)
        other_hidden = decoder(torch.where(hidden[..., None], noise, tokens), hidden)
        for m, part in zip(GRIDS, hidden.split(SIZES, 1)):
            assert torch.equal(other_visible[m][part], as_is[m][part]) == apart
            assert torch.equal(other_hidden[m][~part], as_is[m][~part]) == apart
            assert not torch.equal(other_hidden[m][part], as_is[m][part])


@pytest.mark.parametrize("m", GRIDS)
def test_the_nearest_visible_patch_equals_a_slow_loop_with_the_first_of_several(m):
    places = list(itertools.product(*map(range, GRIDS[m])))
    x = random(6, len(places), 3)
    hidden = random(6, len(places), seed=3) < 0.8
    hidden[:, 1] = False
    got = pixels.nearest_visible(x, hidden, GRIDS[m])
    ties = 0
    for b, i in itertools.product(range(6), range(len(places))):
        seen = [j for j in range(len(places)) if not hidden[b, j]]
        distance = [math.dist(places[i], places[j]) for j in seen]
        ties += distance.count(min(distance)) > 1
        assert torch.equal(got[b, i], x[b, seen[distance.index(min(distance))]])
    assert ties and torch.equal(got[~hidden], x[~hidden])
    nothing = torch.ones_like(hidden)
    assert pixels.nearest_visible(x, nothing, GRIDS[m]).shape == x.shape                # no crash


def planted(step, weight=1.0):
    """What `decode` returns for a batch of 3 clips, not all of which have sound."""
    decoded = {}
    for m, n in zip(GRIDS, SIZES):
        has = torch.tensor([True, m == "video" or step % 2 == 0, m == "video"])
        hidden = random(3, n, seed=step) < 0.2
        truth = 5 + random(3, n, 4, seed=100 + step)
        decoded[m] = pixels.Decoded(weight * random(3, n, 4, seed=step), truth, hidden, has)
    return decoded


def test_the_mean_image_is_that_of_the_clips_that_have_the_modality():
    weight = torch.nn.Parameter(torch.ones(()))
    batches = 7 * [{"index": torch.arange(0), "bad": [], "lost": 0}]

    def decode(batch, step):
        return planted(step, weight)

    mean = pixels.train_decoder(decode, [weight], batches, 7, 0.1, data.Troubles(3))
    for m, count in (("video", 21), ("audio", 11)):
        truth = torch.cat([planted(step)[m].truth[planted(step)[m].has] for step in range(7)])
        assert len(truth) == count
        torch.testing.assert_close(mean[m], truth.double().mean(0).float())
    assert weight.item() != 1


def test_the_errors_equal_a_slow_loop_over_patches_and_leave_out_what_a_clip_lacks():
    mean = {m: random(n, 4) for m, n in zip(GRIDS, SIZES)}
    batches = []
    for number in range(4):                                 # each under two masks
        has = {f"has_{m}": planted(2 * number)[m].has for m in GRIDS}
        batches.append(has | {"index": torch.arange(3) + 3 * number})

    def decode(batch, step):
        return {m: one._replace(has=batch[f"has_{m}"]) for m, one in planted(step).items()}

    errors, count, whole = pixels.pixel_errors(decode, batches, mean, GRIDS, 8)
    assert count == {"video": 12, "audio": 8} and whole == [0, 1, 3, 4, 6, 7, 9, 10]
    for m in GRIDS:
        values = {}
        for step in range(8, 16):
            one = decode(batches[(step - 8) // 2], step)[m]
            nearest = pixels.nearest_visible(one.truth, one.hidden, GRIDS[m])
            guesses = {"decoder": one.pixels, "mean": mean[m].expand(3, -1, -1), "nearest": nearest}
            for (name, guess), b, i in itertools.product(guesses.items(), range(3), range(len(mean[m]))):
                part = "hidden" if one.hidden[b, i] else "visible"
                if one.has[b]:
                    error = (guess[b, i] - one.truth[b, i]).square().mean().item()
                    values.setdefault((part, name), []).append(error)
        values.pop(("visible", "nearest"))
        for (part, name), each in values.items():
            assert errors[part][m].pop(name) == pytest.approx(np.mean(each), rel=1e-5)
        assert not errors["hidden"][m] and not errors["visible"][m]


# ---- what the predictors imagine -----------------------------------------------------------------------

def small_model(name, *flags):
    """(a small model of a method with random weights, its recipe)"""
    script = SCRIPTS[name]
    _, recipe = script.get_args(["--recipe", "toy", "--size", "nano", *flags])
    return script.make_model(recipe, script.make_inputs(recipe)).eval(), recipe


CASES = [  # method, flags, modalities that are given, the inputs that they are
    *[("ajepa", ["--masking", masking], ["audio"], ["a"]) for masking in ajepa.MASKINGS],
    ("mjepa", [], ["audio"], ["a"]),
    ("mjepa", [], ["video"], ["v"]),
    ("mjepa", [], ["video", "audio"], ["av"]),
    ("mjepa", ["--terms", "separate-audio"], ["audio"], ["a"]),
    ("avjepa_ncsu", [], ["audio"], ["a"]),
    ("avjepa_ncsu", [], ["video", "audio"], ["v", "a"]),
    ("avjepa_ncsu", ["--modalities", "video"], ["video"], ["v"])]


def change(clips, chosen, vit):
    """The clips with other pixels in the chosen patches, (B, N) bool."""
    out = {}
    for m, part in zip(clips, chosen.split([vit.num(m) for m in clips], 1)):
        x = pixels.patchify(clips[m], vit.patch[m])
        x = pixels.unpatchify(torch.where(part[..., None], x + 3, x), vit.grids[m], vit.patch[m])
        out[m] = torch.cat([x, clips[m][..., x.shape[-1]:]], -1)                        # what is cut off
    return out


@pytest.mark.parametrize("name, flags, modalities, inputs", CASES)
def test_imagined_are_the_contexts_tokens_where_a_patch_is_visible_and_else_the_predictors(
        name, flags, modalities, inputs):
    model, recipe = small_model(name, *flags)
    vit = model.context_encoder
    clips = {m: random(2, common.CHANNELS[m], *vit.shape[m], seed=len(m)) for m in modalities}
    for step in (4, 5):                                     # the mask sets in turn
        masks = SCRIPTS[name].draw_masks(5, step, 0, 2, vit.grids, recipe)
        number = step % len(masks)
        tokens, hidden = pixels.imagine(model, masks, clips, step)
        for b in range(2):
            mask_set = {}
            for i in inputs:
                context, target = masks[number][i]
                total = sum(vit.num(m) for m in model.inputs[i])
                lacks = sorted(set(range(total)) - set(context[b].tolist()))
                # the curriculum hides more than its targets
                assert lacks == sorted(target[b].tolist()) or "curriculum" in flags
                mask_set[i] = context[b:b + 1], torch.tensor([lacks])
            h = model.see(vit.embed(**{m: x[b:b + 1] for m, x in clips.items()}), mask_set)
            predictions = model.predictor(h, mask_set, number)
            begin = 0
            for i, (context, lacks) in mask_set.items():
                seen, h = h.tensor_split([context.shape[1]], 1)
                torch.testing.assert_close(tokens[b, begin + context], seen, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(tokens[b, begin + lacks], predictions[i], atol=1e-5, rtol=1e-4)
                assert not hidden[b, begin + context].any() and hidden[b, begin + lacks].all()
                begin += context.shape[1] + lacks.shape[1]
            assert begin == tokens.shape[1]
        # what is hidden does not leak
        assert torch.equal(pixels.imagine(model, masks, change(clips, hidden, vit), step)[0], tokens)
        other, _ = pixels.imagine(model, masks, change(clips, ~hidden, vit), step)
        assert not torch.equal(other[hidden], tokens[hidden])


@pytest.mark.parametrize("name, flags, asked", [
    ("mjepa", ["--terms", "separate-audio"], ["video"]),
    ("avjepa_ncsu", ["--modalities", "video"], ["audio"]),
    ("avjepa_ncsu", ["--modalities", "video"], ["video", "audio"]), ("ajepa", [], ["video"])])
def test_an_input_that_was_not_trained_is_refused(name, flags, asked):
    model, _ = small_model(name, *flags)
    with pytest.raises(UserError, match="predictor was not trained on .*; give another --modality") as error:
        pixels.choose_inputs(model, asked)
    assert "\n" not in str(error.value)


# ---- the command ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """{method: the folder of a run of one step at a learning rate of 0, which ends where it began}."""
    folders = {}
    for name, script in SCRIPTS.items():
        folders[name] = tmp_path_factory.mktemp("runs") / name
        words = ["--data", "folder", "--data-dir", toy / "train", "--out", folders[name], "--seed", 7]
        words += "--recipe toy --size nano --steps 1 --batch-size 4 --lr 0 --workers 0 --device cpu".split()
        script.main([str(word) for word in words])
    return folders


@pytest.mark.parametrize("name", ["ajepa", "avjepa_ncsu"])  # MJEPA's warm-up begins above 0
def test_untrained_is_the_very_model_that_the_run_began_with(name, runs):
    content = common.load_checkpoint(runs[name])
    trained, draw_masks = pixels.restore(content)
    untrained, _ = pixels.restore(content, untrained=True)
    assert draw_masks is SCRIPTS[name].draw_masks and not any(p.requires_grad for p in trained.parameters())
    for (key, a), b in zip(trained.named_parameters(), untrained.parameters()):
        assert torch.equal(a, b), key
    for x in content["model"].values():
        x.zero_()
    trained, _ = pixels.restore(content)
    untrained, _ = pixels.restore(content, untrained=True)
    assert not trained.predictor.head.weight.any() and untrained.predictor.head.weight.any()


def flags(run_folder, toy, *more):
    words = "--data toy --epochs 1 --batch-size 8 --workers 0 --device cpu".split()
    return [str(word) for word in ("--ckpt", run_folder, "--data-dir", toy, *words, *more)]


def last_row(run_folder):
    return json.loads((run_folder / "probe.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("name, modalities", [("ajepa", ["audio"]), ("mjepa", ["video", "audio"])])
def test_the_command_writes_its_row_and_its_picture(name, modalities, runs, toy, tmp_path):
    run_folder = shutil.copytree(runs[name], tmp_path / "run")
    done = command([sys.executable, str(ROOT / "pixels.py"), *flags(run_folder, toy)], tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    row = last_row(run_folder)
    assert (row["probe"], row["baseline"], row["decode"], row["lrs"]) == ("pixels", None, "together", [1e-3])
    assert row["modality"] == ("av" if len(modalities) == 2 else "audio")
    assert row["N"] == dict.fromkeys(modalities, 16)
    assert (row["step"], row["left_out"], row["picture"]) == (1, 0, "pixels-toy.png")
    for part in ("hidden", "visible"):
        assert list(row[part]) == modalities and all(min(e.values()) > 0 for e in row[part].values())
    assert "hidden: nearest" in done.stdout and "N = 16" in done.stdout
    assert (run_folder / "pixels-toy.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(run_folder.glob("*.part"))


def test_the_untrained_model_and_one_modality_have_pictures_of_their_own(runs, toy, tmp_path, monkeypatch):
    run_folder = shutil.copytree(runs["avjepa_ncsu"], tmp_path / "run")
    drawn = []
    real = pixels.draw_pixels
    monkeypatch.setattr(pixels, "draw_pixels", lambda x, *more: drawn.append(x) or real(x[:1], *more))
    for more, picture, modalities in (
            (["--baseline", "untrained", "--decode", "apart"], "pixels-toy-apart-untrained.png",
             ["video", "audio"]),
            (["--modality", "audio"], "pixels-toy-audio.png", ["audio"]),
            (["--modality", "video", "--lr", 1e-2], "pixels-toy-video.png", ["video"])):
        pixels.main(flags(run_folder, toy, *more))
        row = last_row(run_folder)
        assert row["picture"] == picture and (run_folder / picture).stat().st_size > 10_000
        assert len(drawn[-1]) == 4 and list(drawn[-1][0][1]) == modalities
        assert row["baseline"] == ("untrained" if "untrained" in more else None)
    assert row["lrs"] == [1e-2]


def refused(argv, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        pixels.main(argv)
    assert "\n" not in str(error.value)


def test_what_cannot_be_imagined_is_refused_in_a_sentence(runs, toy, tmp_path, monkeypatch):
    content = common.load_checkpoint(write_checkpoint(tmp_path))
    for name in ("made_up", "avjepa_lejepa"):               # no such script; one without masks
        content["method"]["name"] = name
        torch.save(content, tmp_path / "latest.pt")
        refused(flags(tmp_path, toy), f"{name} has no predictor of hidden patches, or .* that has one")
    refused(flags(runs["ajepa"], toy, "--modality", "video"), "--modality video: ajepa takes no video")
    loose = ["--data", "folder", "--data-dir", str(toy / "train")]
    refused(flags(runs["ajepa"], toy, *loose), "no clip is held out, .*; put them into two sub-folders")
    refused(flags(runs["ajepa"], toy, "--batch-size", 25), "larger than the set")
    refused(flags(runs["ajepa"], toy, "--batch-size", 1), "--batch-size 1 is out of range")
    refused(flags(runs["ajepa"], toy, "--lr", 11), "--lr 11.0 is out of range")
    item = data.Clips.item
    monkeypatch.setattr(data.Clips, "item", lambda self, *key: item(self, *key) | {"has_audio": False})
    refused(flags(runs["mjepa"], toy), "no training clip has audio; give another --modality")
