"""The pixel probe: patches and their order, the decoder, what it is compared with, what the predictors imagine, the command."""
import itertools, json, math, shutil, signal, sys

import ajepa, avjepa_ncsu, common, data, mjepa, probe
from conftest import ROOT, command

import numpy as np
import pytest
import torch

VIDEO, AUDIO = dict(shape=(4, 16, 16), patch=(2, 4, 4)), dict(shape=(12, 21), patch=(4, 4))      # 2 x 4 x 4 and 3 x 5 patches
SHAPES = {"video": (3, 4, 16, 16), "audio": (1, 12, 21)}
GRIDS, SIDES = {"video": (2, 4, 4), "audio": (3, 5)}, {"video": (2, 4, 4), "audio": (4, 4)}


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(common.SIZES, "nano", (32, 3, 4, 64))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clips_of(modalities, batch):
    return {m: random(batch, *SHAPES[m], seed=len(m)) for m in modalities}


def encoder_patches():
    vit = common.ViT("nano", VIDEO, AUDIO)
    return {"video": vit.video, "audio": vit.audio}


# ---- patches --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m", ["video", "audio"])
def test_patches_and_their_pixels_stand_as_in_the_convolution_of_the_encoder(m):
    conv, x = encoder_patches()[m].proj, random(2, *SHAPES[m])
    ours = probe.patchify(x, SIDES[m]) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(ours, conv(x).flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("m", ["video", "audio"])
def test_a_planted_pixel_is_found_in_its_patch(m):
    g, (channels, *shape) = np.random.default_rng(0), SHAPES[m]
    for _ in range(20):
        c, at = int(g.integers(channels)), [int(g.integers(n * side)) for n, side in zip(GRIDS[m], SIDES[m])]
        x = torch.zeros(1, channels, *shape)
        x[(0, c, *at)] = 1
        token = np.ravel_multi_index([a // side for a, side in zip(at, SIDES[m])], GRIDS[m])
        pixel = np.ravel_multi_index([c, *(a % side for a, side in zip(at, SIDES[m]))], [channels, *SIDES[m]])
        assert probe.patchify(x, SIDES[m])[0].nonzero().tolist() == [[token, pixel]]


@pytest.mark.parametrize("m", ["video", "audio"])
def test_unpatchify_inverts_patchify_but_for_what_is_cut_off(m):
    x = random(2, *SHAPES[m])
    back = probe.unpatchify(probe.patchify(x, SIDES[m]), GRIDS[m], SIDES[m])
    whole = tuple(slice(n * side) for n, side in zip(GRIDS[m], SIDES[m]))
    assert torch.equal(back, x[(..., *whole)]) and (back.shape[-1] == 20 if m == "audio" else back.shape == x.shape)


# ---- the decoder and what it is compared with -----------------------------------------------------------------------

def test_the_decoder_restores_a_planted_pattern_where_it_is_visible():
    """Each patch is one of eight patterns, its token a fixed random linear map of it, or zero where it is hidden."""
    patches = encoder_patches()
    pattern = {m: random(8, math.prod(SIDES[m]) * SHAPES[m][0], seed=1) for m in patches}
    to_token = {m: random(pattern[m].shape[1], 48, seed=2) for m in patches}
    decoder = probe.PixelDecoder(48, patches, 64)

    def decode(batch, step):
        g, out = torch.Generator().manual_seed(1000 + step), {}
        true = {m: pattern[m][torch.randint(8, (8, p.num), generator=g)] for m, p in patches.items()}
        hidden = torch.rand(8, 47, generator=g) < 0.3
        tokens = torch.cat([true[m] @ to_token[m] for m in patches], 1) * ~hidden[..., None]
        made, begin = decoder(tokens, hidden), 0
        for m, p in patches.items():
            out[m] = made[m], true[m], hidden[:, begin:begin + p.num], torch.ones(8, dtype=torch.bool)
            begin += p.num
        return out

    batch = {"index": torch.arange(8), **{f"has_{m}": torch.ones(8, dtype=torch.bool) for m in ("video", "audio")}}
    blank = batch | {"short": torch.zeros(8), "bad": [], "lost": 0}
    mean = probe.train_decoder(decode, decoder.parameters(), (blank for _ in range(250)), 250, 3e-3, data.Troubles(8))
    errors, _, _ = probe.pixel_errors(decode, [batch], mean, GRIDS, 250)
    for m, e in errors["visible"].items():
        assert e["decoder"] < 0.02 * e["mean"] and e["mean"] > 0.5, (m, e)


def test_apart_a_hidden_patch_is_decoded_from_predicted_tokens_alone_and_a_visible_one_from_visible_ones():
    patches, hidden = encoder_patches(), torch.rand(2, 47, generator=torch.Generator().manual_seed(0)) < 0.5
    tokens, noise = random(2, 47, 16), random(2, 47, 16, seed=1)
    for apart in (True, False):
        decoder = probe.PixelDecoder(16, patches, 128, apart)
        made = {name: decoder(x, hidden) for name, x in (("as is", tokens), ("visible", torch.where(hidden[..., None], tokens, noise)),
                                                         ("hidden", torch.where(hidden[..., None], noise, tokens)))}
        for m, h in zip(patches, hidden.split([32, 15], 1)):
            assert torch.equal(made["visible"][m][h], made["as is"][m][h]) == apart             # what is visible changes nothing here
            assert torch.equal(made["hidden"][m][~h], made["as is"][m][~h]) == apart
            assert not torch.equal(made["hidden"][m][h], made["as is"][m][h])


def test_the_nearest_visible_patch_equals_a_slow_loop_with_the_first_of_several():
    for grid in GRIDS.values():
        n, places = math.prod(grid), list(itertools.product(*map(range, grid)))
        x, hidden = random(6, n, 3), torch.rand(6, n, generator=torch.Generator().manual_seed(3)) < 0.8
        hidden[:, 1] = False
        got, ties = probe.nearest_visible(x, hidden, grid), 0
        for b in range(6):
            seen = [i for i in range(n) if not hidden[b, i]]
            for i in range(n):
                distance = [sum((p - q) ** 2 for p, q in zip(places[i], places[j])) for j in seen]
                ties += distance.count(min(distance)) > 1
                assert torch.equal(got[b, i], x[b, seen[distance.index(min(distance))]])
        assert ties and torch.equal(got[~hidden], x[~hidden])
    assert probe.nearest_visible(x, torch.ones_like(hidden), grid).shape == x.shape                # nothing visible: no crash


def planted(step, seed=0):
    """What `decode` returns for a batch of 3 clips, not all of which have sound."""
    g = torch.Generator().manual_seed(100 * seed + step)
    return {m: (torch.randn(3, n, 4, generator=g), 5 + torch.randn(3, n, 4, generator=g), torch.rand(3, n, generator=g) < 0.6,
                torch.tensor([True, m == "video" or step % 2 == 0, m == "video"])) for m, n in (("video", 32), ("audio", 15))}


def test_the_mean_image_is_that_of_the_clips_that_have_the_modality():
    weight = torch.nn.Parameter(torch.ones(()))
    blank = {"index": torch.arange(0), "bad": [], "lost": 0}
    mean = probe.train_decoder(lambda batch, step: {m: (made * weight, *more) for m, (made, *more) in planted(step).items()}, [weight],
                               [blank] * 7, 7, 0.1, data.Troubles(3))
    for m in mean:
        true = np.concatenate([planted(step)[m][1].numpy()[planted(step)[m][3].numpy()] for step in range(7)]).astype(np.float64)
        assert len(true) == (21 if m == "video" else 11)
        np.testing.assert_allclose(mean[m].numpy(), true.mean(0), atol=1e-6)
    assert weight.item() != 1


def test_the_errors_equal_a_slow_loop_over_patches_and_leave_out_what_a_clip_lacks():
    mean, has = {m: random(n, 4) for m, n in (("video", 32), ("audio", 15))}, {"has_video": torch.tensor([True] * 3)}
    batches = [has | {"index": torch.arange(3) + 3 * b, "has_audio": planted(8 + b)["audio"][3]} for b in range(4)]
    def decode(batch, step):
        return {m: (*one[:3], batch[f"has_{m}"]) for m, one in planted(step).items()}

    errors, count, whole = probe.pixel_errors(decode, batches, mean, GRIDS, 8)
    assert count == {"video": 12, "audio": 6} and whole == [0, 1, 3, 6, 7, 9]
    for m in GRIDS:
        values = {}
        for step in range(8, 16):                               # two masks for each batch
            made, true, hidden, here = decode(batches[(step - 8) // 2], step)[m]
            near = probe.nearest_visible(true, hidden, GRIDS[m])
            for b, i in itertools.product(range(3), range(len(mean[m]))):
                for name, guess in (("decoder", made[b, i]), ("mean", mean[m][i]), ("nearest", near[b, i])):
                    if here[b]:
                        error = float(((guess - true[b, i]) ** 2).mean())
                        values.setdefault(("hidden" if hidden[b, i] else "visible", name), []).append(error)
        assert set(errors["visible"][m]) == {"decoder", "mean"} and set(errors["hidden"][m]) == {"decoder", "mean", "nearest"}
        for part in errors:
            for name, value in errors[part][m].items():
                assert value == pytest.approx(np.mean(values[part, name]), rel=1e-5)


# ---- what the predictors imagine ------------------------------------------------------------------------------------

def ajepa_model(*flags):
    recipe = ajepa.get_args(["--pred-depth", "1", "--pred-dim", "32", *flags])[1]
    common.seed_step(0, 0)
    return ajepa.AJEPA(dict(size="nano", audio=AUDIO, positions="factorised"), 32, 1, "smooth_l1").eval(), recipe


def mjepa_model(terms="all"):
    common.seed_step(0, 0)
    config = dict(size="nano", video=VIDEO, audio=AUDIO, levels=[0, 1], positions="factorised")
    return mjepa.MJEPA(config | ({"video": None} if terms == "separate-audio" else {}), mjepa.TERMS[terms], 32, 1).eval(), \
        mjepa.get_args(["--terms", terms])[1]


@pytest.mark.parametrize("masking", ajepa.MASKINGS)
def test_ajepa_imagines_each_patch_that_the_context_lacks(masking):
    (model, recipe), clips = ajepa_model("--masking", masking), clips_of(["audio"], 3)
    tokens, hidden = ajepa.imagine(model, recipe, clips, 5, 7)
    context = ajepa.draw_masks(5, 7, 0, 3, GRIDS["audio"], recipe, 1.0)[0]
    for b in range(3):
        seen = set(context[b].tolist())
        lacks = [i for i in range(15) if i not in seen]
        h = model.context_encoder(audio=clips["audio"][b:b + 1], visible=context[b:b + 1])
        guess = model.predictor(h, context[b:b + 1], torch.tensor([lacks]))
        assert hidden[b].tolist() == [i not in seen for i in range(15)]
        for where, x in ((context[b].tolist(), h), (lacks, guess)):
            torch.testing.assert_close(tokens[b, where], x[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind, step", [("a", 2), ("v", 3), ("av", 4), ("av", 5)])
def test_mjepa_imagines_the_targets_of_one_of_its_mask_sets_in_all_levels(kind, step):
    (model, recipe), modalities = mjepa_model(), mjepa.MODALITIES[kind]
    clips = clips_of(modalities, 3)
    tokens, hidden = mjepa.imagine(model, recipe, clips, 5, step)
    context, target = mjepa.draw_masks(5, step, 0, 3, GRIDS, recipe)[kind][step % 2]
    assert tokens.shape == (3, sum(math.prod(GRIDS[m]) for m in modalities), 96)
    for b in range(3):
        one = {m: x[b:b + 1] for m, x in clips.items()}
        h = model.context_encoder(**one, visible=context[b:b + 1], layers=[0, 1, 2])
        guess = model.predictor(h, context[b:b + 1], target[b:b + 1], modalities)
        assert hidden[b].nonzero()[:, 0].tolist() == sorted(target[b].tolist())
        for where, x in ((context[b].tolist(), h), (target[b].tolist(), guess)):
            torch.testing.assert_close(tokens[b, where], x[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("modalities", [("audio",), ("video",), ("video", "audio")])
def test_what_is_hidden_does_not_leak(modalities):
    for script, (model, recipe) in [(mjepa, mjepa_model())] + [(ajepa, ajepa_model())] * (modalities == ("audio",)):
        clips = clips_of(modalities, 4)
        tokens, hidden = script.imagine(model, recipe, clips, 1, 0)
        other, begin = {}, 0
        for m in modalities:
            part = hidden[:, begin:begin + math.prod(GRIDS[m])]
            x = probe.patchify(clips[m], SIDES[m])
            begin += part.shape[1]
            for change, rows in (("hidden", part), ("visible", ~part)):
                other.setdefault(change, {})[m] = probe.unpatchify(torch.where(rows[..., None], x + 3, x), GRIDS[m], SIDES[m])
        other = {k: {m: torch.cat([x, clips[m][..., x.shape[-1]:]], -1) for m, x in v.items()} for k, v in other.items()}
        assert torch.equal(script.imagine(model, recipe, other["hidden"], 1, 0)[0], tokens)
        assert not torch.equal(script.imagine(model, recipe, other["visible"], 1, 0)[0][hidden], tokens[hidden])


def test_an_input_that_the_terms_did_not_train_is_refused():
    model, recipe = mjepa_model("separate-audio")
    assert mjepa.imagine(model, recipe, clips_of(["audio"], 2), 0, 0)[0].shape == (2, 15, 96)
    with pytest.raises(common.UserError, match="--terms separate-audio has no term v, .* give another --modality"):
        mjepa.imagine(model, recipe, clips_of(["video"], 2), 0, 0)


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """{method: folder}: a run of two steps of A-JEPA and of MJEPA, and what --probe pixels needs of a checkpoint of AV-JEPA."""
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in ("ajepa", "mjepa", "avjepa_lejepa")}
    for script in (ajepa, mjepa):
        script.main(["--data", "folder", "--data-dir", str(toy / "train"), "--recipe", "toy", "--steps", "2", "--batch-size", "4",
                     "--workers", "0", "--device", "cpu", "--out", str(folders[script.METHOD])])
    folders["avjepa_lejepa"].mkdir()
    common.save_checkpoint(folders["avjepa_lejepa"] / "latest.pt", method="avjepa_lejepa")
    return folders


def flags(run, toy, *more):
    return ["--ckpt", str(run), "--data", "toy", "--data-dir", str(toy), "--probe", "pixels", "--epochs", "1", "--batch-size", "8",
            "--workers", "0", "--device", "cpu", *map(str, more)]


def last_row(run):
    return json.loads((run / "probe.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("method", ["ajepa", "mjepa"])
def test_the_command_writes_its_row_and_its_picture(runs, toy, tmp_path, method):
    run = shutil.copytree(runs[method], tmp_path / "run")
    done = command([sys.executable, str(ROOT / "probe.py"), *map(str, flags(run, toy))], tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    row, modalities = last_row(run), ["audio"] if method == "ajepa" else ["video", "audio"]
    assert row["probe"] == "pixels" and row["modality"] == ("audio" if method == "ajepa" else "av") and row["baseline"] is None
    assert row["N"] == dict.fromkeys(modalities, 16) and (row["step"], row["left_out"], row["picture"]) == (2, 0, "pixels-toy.png")
    for part, names in (("hidden", {"decoder", "mean", "nearest"}), ("visible", {"decoder", "mean"})):
        assert list(row[part]) == modalities and all(set(e) == names and min(e.values()) > 0 for e in row[part].values())
    assert "hidden: nearest" in done.stdout and "N = 16" in done.stdout
    assert (run / "pixels-toy.png").read_bytes()[:4] == b"\x89PNG" and not (run / "pixels-toy.png.part").exists()


def test_the_untrained_model_and_a_single_modality_have_pictures_of_their_own(runs, toy, tmp_path, monkeypatch):
    run, drawn, real = shutil.copytree(runs["mjepa"], tmp_path / "run"), [], probe.draw_pixels
    monkeypatch.setattr(probe, "draw_pixels", lambda clips, *more: drawn.append(clips) or real(clips[:1], *more))
    for more, name in ((("--baseline", "untrained"), "pixels-toy-untrained.png"), (("--modality", "audio"), "pixels-toy-audio.png"),
                       (("--modality", "video", "--lr", 1e-2), "pixels-toy-video.png")):
        probe.main(flags(run, toy, *more))
        assert last_row(run)["picture"] == name and (run / name).stat().st_size > 10_000
    assert [len(clips) for clips in drawn] == [4, 4, 4]
    assert [list(clips[0][1]) for clips in drawn] == [["video", "audio"], ["audio"], ["video"]]
    rows = [json.loads(line) for line in (run / "probe.jsonl").read_text().splitlines()]
    assert [row["baseline"] for row in rows] == ["untrained", None, None] and rows[2]["lrs"] == [1e-2]
    common.seed_step(0, 0)
    untrained = mjepa.restore({**common.load_checkpoint(run), "model": None})
    assert not torch.equal(untrained.predictor.head.weight, mjepa.restore(common.load_checkpoint(run)).predictor.head.weight)


@pytest.mark.parametrize("script", [ajepa, avjepa_ncsu])
def test_untrained_is_the_very_model_that_the_run_began_with(toy, tmp_path, script):
    """A run at a learning rate of 0 ends where it began."""
    script.main(["--data", "folder", "--data-dir", str(toy / "train"), "--recipe", "toy", "--steps", "1", "--batch-size", "4", "--lr", "0",
                 "--seed", "7", "--workers", "0", "--device", "cpu", "--out", str(tmp_path)])
    content = common.load_checkpoint(tmp_path)
    trained, before = script.restore(content), torch.get_rng_state()
    common.seed_step(7, 0)
    untrained = script.restore({**content, "model": None})
    torch.set_rng_state(before)
    for (name, a), b in zip(trained.named_parameters(), untrained.parameters()):
        assert torch.equal(a, b), name


def refusal(argv, capsys):
    """The sentence on which a command line ends with exit code 2."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            common.main_guard(lambda: probe.main(argv))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("more, sentence", [
    (["--head", "linear"], "--head has no effect without --probe finetune"), (["--crops", 1], "--crops has no effect"),
    (["--views", 2], "--views has no effect without --probe linear"), (["--layers", 1], "--layers has no effect"),
    (["--encoder", "target"], "--encoder has no effect"), (["--absent", "drop"], "--absent has no effect"),
    (["--cache-gb", 1], "--cache-gb has no effect"), (["--encoder-lr", 1e-3], "--encoder-lr has no effect"),
    (["--regularised-masking", 0.1], "--regularised-masking has no effect"), (["--baseline", "raw"], "--baseline raw has no tokens"),
    (["--seconds", 1], "--seconds has no effect"), (["--save-features", "x.npz"], "--save-features trains nothing"),
    (["--lr", 1e-3, 1e-2], "--lr: --probe pixels takes one learning rate"), (["--split", "test"], "--split has no effect without"),
    (["--patch-level"], "--patch-level has no effect without --save-features")])
def test_a_flag_without_effect_is_refused(more, sentence, capsys):
    assert sentence in refusal(["--ckpt", "x", "--data", "toy", "--probe", "pixels", *map(str, more)], capsys)


def test_decode_is_for_pixels_alone(capsys):
    assert "--decode has no effect without --probe pixels" in refusal(["--ckpt", "x", "--data", "toy", "--decode", "apart"], capsys)


def test_what_cannot_be_imagined_is_refused_in_a_sentence(runs, toy, capsys):
    assert "avjepa_lejepa has no predictor of hidden patches; --probe pixels takes" in refusal(flags(runs["avjepa_lejepa"], toy), capsys)
    assert "--modality video: ajepa takes no video" in refusal(flags(runs["ajepa"], toy, "--modality", "video"), capsys)
    loose = ["--ckpt", str(runs["ajepa"]), "--data", "folder", "--data-dir", str(toy / "train"), "--probe", "pixels", "--device", "cpu"]
    assert "no clip is held out, all are for training; put them into two sub-folders, train and test" in refusal(loose, capsys)
    assert "larger than the set" in refusal(flags(runs["ajepa"], toy, "--batch-size", 25), capsys)


def test_clips_of_which_none_has_sound_are_refused(runs, toy, tmp_path, monkeypatch, capsys):
    item = data.Clips.item
    monkeypatch.setattr(data.Clips, "item", lambda self, *key: item(self, *key) | {"has_audio": False})
    assert "no training clip has audio; give another --modality" in refusal(flags(runs["mjepa"], toy), capsys)
