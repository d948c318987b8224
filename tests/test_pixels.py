"""Patches and their order, the decoder, what it is compared with, what predictors imagine, the command."""
import collections
import itertools
import math
import shutil

import numpy as np
import pytest
import torch

import ajepa
import avjepa_ncsu
import common
import data
import mjepa
import pixels
import run
from conftest import fails, last_row, same, write_checkpoint
from slow import quicken, random, small_model

SHAPES = {"video": (3, 4, 16, 16), "audio": (1, 12, 21)}
GRIDS = {"video": (2, 4, 4), "audio": (3, 5)}           # 32 and 15 patches
SIDES = {"video": (2, 4, 4), "audio": (4, 4)}
SIZES = [32, 15]
SCRIPTS = {"ajepa": ajepa, "mjepa": mjepa, "avjepa_ncsu": avjepa_ncsu}


@pytest.mark.parametrize("m", SHAPES)
def test_patches_stand_as_in_the_convolution_of_the_encoder_and_come_back_but_for_what_is_cut_off(m):
    encoder = common.ViT("nano", **{m: dict(shape=SHAPES[m][1:], patch=SIDES[m])}).requires_grad_(False)
    x = random(2, *SHAPES[m])
    expected = encoder.embed(**{m: x}) - encoder.embed(**{m: 0 * x})  # without bias and positions
    weight = next(p for p in encoder.parameters() if p.ndim == 2 + len(SIDES[m]))       # of the convolution
    patches = pixels.patchify(x, SIDES[m])
    torch.testing.assert_close(patches @ weight.flatten(1).T, expected, atol=1e-5, rtol=1e-4)
    whole = tuple(slice(n * side) for n, side in zip(GRIDS[m], SIDES[m]))
    assert torch.equal(pixels.unpatchify(patches, GRIDS[m], SIDES[m]), x[(..., *whole)])


def test_the_decoder_restores_a_planted_pattern_where_it_is_visible():
    """Each patch is one of eight patterns, its token a fixed linear map of it, or zero where it is hidden."""
    pattern = {m: random(8, math.prod(SIDES[m]) * SHAPES[m][0], seed=1) for m in GRIDS}
    to_token = {m: random(pattern[m].shape[1], 48, seed=2) for m in GRIDS}
    decoder = pixels.PixelDecoder(48, GRIDS, SIDES, 64)
    has = torch.ones(8, dtype=torch.bool)

    def decode(batch, step):
        truth = {m: pattern[m][torch.randint(8, (8, n))] for m, n in zip(GRIDS, SIZES)}
        hidden = torch.rand(8, 47) < 0.3
        tokens = torch.cat([truth[m] @ to_token[m] for m in GRIDS], 1) * ~hidden[..., None]
        decoded = decoder(tokens, hidden)
        parts = dict(zip(GRIDS, hidden.split(SIZES, 1)))
        return {m: pixels.Decoded(decoded[m], truth[m], parts[m], has) for m in GRIDS}

    batch = dict(index=torch.arange(8), has_video=has, has_audio=has, short=~has, bad=[], lost=0)
    mean = pixels.train_decoder(decode, decoder.parameters(), [batch] * 250, 250, 3e-3, data.Troubles(8))
    errors, _, _ = pixels.pixel_errors(decode, [batch], mean, GRIDS, 250)
    for e in errors["visible"].values():
        assert e["decoder"] < 0.05 * e["mean"] and e["mean"] > 0.5


@pytest.mark.parametrize("apart", [True, False])
def test_apart_hidden_patches_are_decoded_from_predicted_tokens_alone_and_visible_ones_from_visible(apart):
    hidden = random(2, 47) < 0
    tokens = random(2, 47, 16)
    noise = random(2, 47, 16, seed=1)
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
    places = list(np.ndindex(*GRIDS[m]))
    x = random(6, len(places), 3)
    hidden = random(6, len(places), seed=3) < 0.8
    hidden[:, 1] = False
    got = pixels.nearest_visible(x, hidden, GRIDS[m])
    ties = 0
    for b, i in np.ndindex(*hidden.shape):
        seen = [j for j in range(len(places)) if not hidden[b, j]]
        distance = [math.dist(places[i], places[j]) for j in seen]
        ties += distance.count(min(distance)) > 1
        assert torch.equal(got[b, i], x[b, seen[distance.index(min(distance))]])
    assert ties
    pixels.nearest_visible(x, torch.ones_like(hidden), GRIDS[m])                        # no crash


def planted(step, weight=1.0):
    """What `decode` returns for a batch of 3 clips, not all of which have sound."""
    decoded = {}
    for m, n in zip(GRIDS, SIZES):
        has = torch.tensor([True, m == "video" or step % 2 == 0, m == "video"])
        hidden = random(3, n, seed=step) < 0.2
        truth = 5 + random(3, n, 4, seed=100 + step)
        decoded[m] = pixels.Decoded(weight * random(3, n, 4, seed=step), truth, hidden, has)
    return decoded


def test_the_mean_image_is_that_of_the_clips_that_have_the_modality_and_the_log_has_the_losses(tmp_path):
    weight = torch.nn.Parameter(torch.ones(()))
    weights = []

    def decode(step, weight):
        """As planted; in the fourth step no clip has sound."""
        decoded = planted(step, weight)
        if step == 3:
            decoded["audio"].has[:] = False
        return decoded

    batches = 7 * [{"index": torch.arange(0), "bad": [], "lost": 0}]
    mean = pixels.train_decoder(
        lambda batch, step: weights.append(weight.item()) or decode(step, weight), [weight], batches, 7, 0.1,
        data.Troubles(3), run.Log(tmp_path))
    assert weight.item() != 1
    total = 0.0
    expected = {"step": 6}
    for m, count in (("video", 21), ("audio", 10)):
        truth = []
        losses = []
        for step, before in enumerate(weights):
            clips = decode(step, before)[m]
            truth.append(clips.truth[clips.has])
            if clips.has.any():
                losses.append((clips.pixels - clips.truth)[clips.has].square().mean().item())
        truth = torch.cat(truth)
        assert len(truth) == count
        torch.testing.assert_close(mean[m], truth.double().mean(0).float())
        expected[f"loss/{m}"] = np.mean(losses)
        total += sum(losses)
    row, = run.read_log(tmp_path)
    assert row == pytest.approx({**expected, "loss": total / 7 / 2})


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
    values = collections.defaultdict(list)
    for step, m in itertools.product(range(8, 16), GRIDS):
        one = decode(batches[(step - 8) // 2], step)[m]
        nearest = pixels.nearest_visible(one.truth, one.hidden, GRIDS[m])
        guesses = {"decoder": one.pixels, "mean": mean[m].expand(3, -1, -1), "nearest": nearest}
        for (name, guess), (b, i) in itertools.product(guesses.items(), np.ndindex(*one.hidden.shape)):
            part = "hidden" if one.hidden[b, i] else "visible"
            if one.has[b] and (part, name) != ("visible", "nearest"):
                error = (guess[b, i] - one.truth[b, i]).square().mean().item()
                values[part, m, name].append(error)
    got = {(part, m): errors[part].pop(m) for part, m in itertools.product(("hidden", "visible"), GRIDS)}
    flat = {}
    for key, row in got.items():
        flat.update({(*key, name): value for name, value in row.items()})
    assert flat == {key: pytest.approx(np.mean(each), rel=1e-5) for key, each in values.items()}


CASES = [  # method, flags, modalities that are given, the inputs that they are
    *[("ajepa", ["--masking", masking], ["audio"], ["a"]) for masking in ajepa.MASKINGS],
    ("mjepa", [], ["audio"], ["a"]),
    ("mjepa", [], ["video"], ["v"]),
    ("mjepa", [], ["video", "audio"], ["av"]),
    ("mjepa", ["--terms", "separate-audio"], ["audio"], ["a"]),
    ("avjepa_ncsu", [], ["audio"], ["a"]),
    ("avjepa_ncsu", [], ["video", "audio"], ["v", "a"]),
    ("avjepa_ncsu", ["--modalities", "video"], ["video"], ["v"])]


@pytest.mark.parametrize("name, flags, modalities, inputs", CASES)
def test_imagined_are_the_contexts_tokens_where_a_patch_is_visible_and_else_the_predictors(
        name, flags, modalities, inputs):
    """The slow way, clip by clip, is given no number where a patch is hidden: none leaks."""
    model, recipe = small_model(SCRIPTS[name], *flags)
    vit = model.context_encoder
    clips = {m: random(2, common.CHANNELS[m], *vit.shape[m], seed=len(m)) for m in modalities}
    for step, b in itertools.product((4, 5), range(2)):     # the mask sets in turn
        masks = SCRIPTS[name].draw_masks(5, step, range(2), vit.grids, recipe)
        number = step % len(masks)
        tokens, hidden = pixels.imagine(model, masks, clips, step)
        mask_set = {}
        for i in inputs:
            context, _ = masks[number][i]                   # the curriculum hides more than its targets
            total = sum(vit.num(m) for m in model.inputs[i])
            lacks = sorted(set(range(total)) - set(context[b].tolist()))
            mask_set[i] = context[b:b + 1], torch.tensor([lacks])
        x = vit.embed(**{m: x[b:b + 1] for m, x in clips.items()})
        h = model.see(x.masked_fill(hidden[b, :, None], math.nan), mask_set)
        predictions = model.predictor(h, mask_set, number)
        begin = 0
        for i, (context, lacks) in mask_set.items():
            seen, h = h.tensor_split([context.shape[1]], 1)
            torch.testing.assert_close(tokens[b, begin + context], seen, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(tokens[b, begin + lacks], predictions[i], atol=1e-5, rtol=1e-4)
            assert not hidden[b, begin + context].any() and hidden[b, begin + lacks].all()
            begin += context.shape[1] + lacks.shape[1]
        assert begin == tokens.shape[1]


@pytest.mark.parametrize("name, flags, asked", [
    ("mjepa", ["--terms", "separate-audio"], ["video"]),
    ("avjepa_ncsu", ["--modalities", "video"], ["audio"]),
    ("avjepa_ncsu", ["--modalities", "video"], ["video", "audio"]), ("ajepa", [], ["video"])])
def test_an_input_that_was_not_trained_is_refused(name, flags, asked):
    sentence = "predictor was not trained on .*; give another --modality"
    fails(pixels.choose_inputs, small_model(SCRIPTS[name], *flags)[0], asked, match=sentence)


@pytest.fixture(scope="module")
def runs(toy, plain_layout, tmp_path_factory):
    """{method: the folder of a run of one step at a learning rate of 0, which ends where it began}."""
    folder = tmp_path_factory.mktemp("runs")
    words = "--recipe toy --size nano --steps 1 --batch-size 4 --lr 0 --workers 0 --device cpu --seed 7"
    for name, script in SCRIPTS.items():
        where = f" --data folder --data-dir {toy}/train --out {folder}/{name}"
        with pytest.MonkeyPatch.context() as patch:
            quicken(patch, script)
            script.main((words + where).split())
    return {name: folder / name for name in SCRIPTS}


@pytest.mark.parametrize("name", ["ajepa", "avjepa_ncsu"])  # MJEPA's warm-up begins above 0
def test_untrained_is_the_very_model_that_the_run_began_with(name, runs):
    content = common.load_checkpoint(runs[name])
    trained, draw_masks = pixels.restore(content)
    untrained, _ = pixels.restore(content, untrained=True)
    assert draw_masks is SCRIPTS[name].draw_masks and not any(p.requires_grad for p in trained.parameters())
    assert same(dict(trained.named_parameters()), dict(untrained.named_parameters()))
    for x in content["model"].values():
        x.zero_()
    assert not pixels.restore(content)[0].predictor.head.weight.any()
    assert pixels.restore(content, untrained=True)[0].predictor.head.weight.any()


def flags(run_folder, toy, *more):
    words = "--data toy --epochs 1 --batch-size 8 --workers 0 --device cpu".split()
    return ["--ckpt", str(run_folder), "--data-dir", str(toy), *words, *more]


@pytest.mark.parametrize("name, more, ending, modalities", [
    ("ajepa", "", "", ["audio"]),
    ("avjepa_ncsu", "--baseline untrained --decode apart", "-apart-untrained", ["video", "audio"]),
    ("avjepa_ncsu", "--modality audio", "-audio", ["audio"]),
    ("avjepa_ncsu", "--modality video --lr .01", "-video", ["video"])])
def test_the_command_writes_its_row_and_its_picture(
        name, more, ending, modalities, runs, toy, tmp_path, monkeypatch, capsys):
    run_folder = shutil.copytree(runs[name], tmp_path / "run")
    drawn = []
    real = pixels.draw_pixels
    monkeypatch.setattr(pixels, "draw_pixels", lambda x, *more: drawn.append(x) or real(x[:1], *more))
    pixels.main(flags(run_folder, toy, *more.split()))
    row = last_row(run_folder)
    expected = dict(
        probe="pixels", baseline="untrained" if "untrained" in more else None, left_out=0, step=1,
        decode="apart" if "apart" in more else "together", lrs=[1e-2 if "--lr" in more else 1e-3],
        modality="av" if len(modalities) == 2 else modalities[0], N=dict.fromkeys(modalities, 16),
        picture=f"pixels-toy{ending}.png")
    assert row == row | expected
    for part in ("hidden", "visible"):
        assert list(row[part]) == modalities and all(min(e.values()) > 0 for e in row[part].values())
    shown = capsys.readouterr().out
    assert "hidden: nearest" in shown and "N = 16" in shown
    assert len(drawn[0]) == 4 and list(drawn[0][0][1]) == modalities
    log = run.read_log(run_folder / f"pixels-toy{ending}")
    losses = sorted(["step", "loss", *(f"loss/{m}" for m in modalities)])
    assert log[-1]["step"] + 1 == row["steps"] and sorted(log[-1]) == losses
    picture = (run_folder / row["picture"]).read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 10_000 and not list(run_folder.glob("*.part"))


def test_what_cannot_be_imagined_is_refused_in_a_sentence(runs, toy, tmp_path, monkeypatch):
    def refused(folder, more, sentence):
        fails(pixels.main, flags(folder, toy, *more.split()), match=sentence)

    content = common.load_checkpoint(write_checkpoint(tmp_path))
    for name in ("made_up", "avjepa_lejepa"):               # no such script; one without masks
        content["method"]["name"] = name
        torch.save(content, tmp_path / "latest.pt")
        refused(tmp_path, "", f"{name} has no predictor of hidden patches, or .* that has one")
    refused(runs["ajepa"], "--modality video", "--modality video: ajepa takes no video")
    loose = f"--data folder --data-dir {toy}/train"
    refused(runs["ajepa"], loose, "no clip is held out, .*; put them into two sub-folders")
    refused(runs["ajepa"], "--batch-size 25", "larger than the set")
    refused(runs["ajepa"], "--batch-size 1", "--batch-size 1 is out of range")
    for word in ("11", "0", "nan", "inf"):
        refused(runs["ajepa"], f"--lr {word}", f"--lr {float(word)} is out of range")
    refused(runs["ajepa"], "--seed -1", "--seed -1 is out of range")
    broken = shutil.copytree(runs["ajepa"], tmp_path / "broken")
    content = common.load_checkpoint(broken)
    content["model"]["predictor.head.weight"][:] = 3e38
    torch.save(content, broken / "latest.pt")
    refused(broken, "", "clip .* of the set: what the encoder says of this clip is no finite number")
    assert not (broken / "probe.jsonl").exists()
    item = data.Clips.item
    monkeypatch.setattr(data.Clips, "item", lambda self, *key: item(self, *key) | {"has_audio": False})
    refused(runs["mjepa"], "", "no training clip has audio; give another --modality")
