"""datasets/still.py: what tells the class and what does not, in the picture and in the sound; the easy toy is
as it was."""
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ajepa
import data
from common import UserError
from conftest import write_world
from slow import quicken_table

RATE = 16000
GRID = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), -1)                  # x, y


def still_item(index, split="train"):
    return data.still_clip(0, split, index)


def names_of(truth):
    return data.STILL_CLASSES[truth["label"]].split()


@pytest.fixture(scope="module")
def clips():
    """Ten of each class."""
    return [still_item(i) for i in range(80)]


@pytest.fixture
def few(clips):
    """Five of each class."""
    return clips[:40]


# --- The clip ---

def test_a_still_clip_is_a_pure_function_of_seed_split_and_index(few):
    frames, wave, truth = few[3]
    assert frames.shape == (40, 64, 64, 3) and frames.dtype == np.uint8 and truth["place"].shape == (40, 2)
    assert wave.shape == (64000,) and wave.dtype == np.float32 and 0.01 < np.abs(wave).max() <= 1
    np.random.seed(6)
    torch.manual_seed(6)
    again = still_item(3)
    for a, b in zip((frames, wave, *truth.values()), (*again[:2], *again[2].values()), strict=True):
        np.testing.assert_array_equal(a, b)
    for key in ((0, "test", 3), (1, "train", 3), (0, "train", 11)):
        other = data.still_clip(*key)
        assert not np.array_equal(other[0], frames) and not np.array_equal(other[1], wave)
    labels = [truth["label"] for _, _, truth in few]
    assert np.bincount(labels).tolist() == [5] * len(data.STILL_CLASSES)


# --- What means nothing ---

def plain_features(clips):
    """Of each clip: (the mean colour of the picture and that at the object's places, the long-term
    spectrum in half octaves, labels)."""
    colors = []
    spectra = []
    labels = []
    for frames, wave, truth in clips:
        x, y = (truth["place"] * 64).astype(int).T
        at_object = np.median(frames[np.arange(40), y, x], 0)
        colors.append([*frames.mean((0, 1, 2)), *at_object])
        power = np.abs(np.fft.rfft(wave)) ** 2
        edges = np.geomspace(100, 6400, 13) * 4                         # a quarter of a hertz a bin
        spectra.append(np.log([part.sum() for part in np.split(power, edges.astype(int))[1:-1]]))
        labels.append(truth["label"])
    return np.array(colors), np.array(spectra), np.array(labels)


def predicted(x, y):
    """Top-1 in percent of logistic regressions on four fifths, tested on the fifth."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=500))
    return 100 * cross_val_score(model, x, y, cv=5).mean()


def test_neither_the_colours_nor_the_long_term_spectrum_tell_the_class_as_the_easy_toys_do(clips):
    """Chance is 12.5 percent, with a standard error of 3.7 for 80 clips."""
    colors, spectra, labels = plain_features(clips)
    assert predicted(colors, labels) < 23 and predicted(spectra, labels) < 25
    colors, spectra, labels = plain_features([data.toy_clip(0, "train", i) for i in range(48)])
    assert predicted(colors, labels) > 50 and predicted(spectra, labels) > 40


def near(truth):
    """(T, H, W) bool: the pixels of a disc around the object, whose long axis goes with its octave."""
    radius = 64 * 0.3 * 2 ** (-truth["octave"] / 2)
    return np.linalg.norm(GRID - 64 * truth["place"][:, None, None], axis=-1) < radius + 2


def test_the_background_is_the_same_in_all_frames_of_a_clip_and_another_in_each_clip(few):
    means = []
    for frames, _, truth in few:
        never = ~near(truth).any(0)                                                         # (H, W)
        early = frames[:20, never].mean(0)
        late = frames[20:, never].mean(0)
        assert len(early) > 100 and np.abs(early - late).max() < 12     # noise of 6, over 20 frames each
        means.append(early.mean(0))
    assert np.std(means, 0).min() > 10


# --- What tells the class ---

def masks_of(frames):
    """(T, H, W) bool: the pixels that are not as they mostly are. Of a pulse it is the rim."""
    frames = frames.astype(float)
    return np.abs(frames - np.median(frames, 0)).max(-1) > 30


def test_shape_and_motion_are_seen_in_the_pixels_where_the_truth_says(few):
    """The spread of the changed pixels is upright or lying; their middle goes as the truth's place does."""
    for index, (frames, _, truth) in enumerate(few):
        shape, motion = names_of(truth)
        place = 64 * truth["place"]
        spans = np.ptp(truth["place"], 0)
        moves = dict(bounces=(False, True), swings=(True, False), circles=(True, True), pulses=(False, False))
        assert tuple(spans > 0.1) == moves[motion] and (spans[~np.array(moves[motion])] == 0).all(), index
        spreads = []
        misses = []
        for mask, (x, y) in zip(masks_of(frames) & near(truth), place):
            pixels = GRID[mask]                                                             # (n, 2)
            if len(pixels) > 25:
                spreads.append(pixels.std(0))
                misses.append(pixels.mean(0) - (x, y))
        assert len(spreads) >= 8 and np.abs(np.median(misses, 0)).max() < 2, index
        wide, high = np.median(spreads, 0)
        assert (high > 1.2 * wide) if shape == "upright" else (wide > 1.2 * high), index


def level(wave):
    """(T,) of each frame's tenth of a second: the root mean square."""
    return np.sqrt((wave.reshape(40, -1).astype(float) ** 2).mean(1))


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


def test_the_loudness_follows_the_motion(few):
    """A bounce is struck at the lowest place, a swing is loud where it is fast, a pulse while it is large."""
    for index, (frames, wave, truth) in enumerate(few):
        _, motion = names_of(truth)
        loud = level(wave)
        if motion == "bounces":
            y = truth["place"][:, 1]
            lowest = 1 + np.flatnonzero((y[1:-1] > y[:-2]) & (y[1:-1] >= y[2:]))            # y is downwards
            lowest = lowest[(lowest > 1) & (lowest < 38)]
            after = np.maximum(loud[lowest], loud[lowest + 1])
            assert len(lowest) and (after > 1.3 * loud[lowest - 2]).all(), index
        elif motion == "swings":
            speed = np.abs(np.gradient(truth["place"][:, 0]))
            assert correlation(loud, speed) > 0.7, index
        elif motion == "circles":
            assert loud.std() < 0.35 * loud.mean(), index
        else:
            changes = frames.reshape(40, -1) - frames.mean(0, dtype=float).ravel()
            size = np.linalg.svd(changes, full_matrices=False)[0][:, 0]                     # up to the sign
            assert abs(correlation(loud, size)) > 0.7, index


def test_the_pitch_falls_with_upright_ones_and_rises_with_lying_ones(few):
    """By the shift that fits best from one spectrum, over log frequency, to that a sixth of a second later,
    when the trembling of the circles is where it was."""
    octave = 48                                                                             # bins
    bins = 120 * 2 ** (np.arange(5 * octave) / octave) * 2048 / RATE
    shifts = np.arange(-octave // 4, octave // 4 + 1)
    for index, (_, wave, truth) in enumerate(few):
        shape, _ = names_of(truth)
        spectrum = torch.stft(torch.from_numpy(wave), 2048, RATE // 6, window=torch.hann_window(2048),
                              return_complex=True).abs().numpy()                            # (F, T)
        heard = np.array([np.interp(bins, np.arange(len(spectrum)), column) for column in spectrum.T])
        fits = [(heard[:-1] * np.roll(heard, -shift, 1)[1:]).sum(1) for shift in shifts]
        best = shifts[np.argmax(fits, 0)]                                                   # (T - 1,)
        rises = np.average(np.sign(best), weights=np.max(fits, 0))                          # the loud count
        assert rises > 0.5 if shape == "lying" else rises < -0.5, index


# --- The set ---

@pytest.fixture(scope="module")
def still(tmp_path_factory):
    return write_world(data.STILL_WORLD, tmp_path_factory.mktemp("still") / "still")


def test_the_easy_toy_is_as_it_was():
    """Its folder, the bytes of world.json, and rounded means of some clips, as on other machines."""
    assert str(data.find_set("toy").folder()) == "cache/toy-v2-seed0"
    assert str(data.find_set("toy-still").folder()) == "cache/toy-still-v1-seed0"
    assert json.dumps(data.TOY, sort_keys=True) == (
        '{"fps": 10, "sample_rate": 16000, "seconds": 4.0, "seed": 0, "side": 64, "test": 256, '
        '"train": 1536, "version": 2}')
    means = {("train", 0): (91.48, 0.04279, 1.2739, 0.6115),
             ("train", 4): (78.80, 0.04836, 1.9842, 0.5614),
             ("test", 6): (87.95, 0.08417, 0.3968, 0.6603)}
    for key, expected in means.items():
        frames, wave, truth = data.toy_clip(0, *key)
        found = (frames.mean(), wave.std(), truth["octave"], truth["place"].mean())
        np.testing.assert_allclose(found, expected, rtol=3e-4)


def test_the_set_is_checked_and_holds_what_the_clips_are(still, capsys):
    data.main(["--data", "toy-still", "--data-dir", str(still), "--check", "--workers", "0"])
    assert capsys.readouterr().out.splitlines() == [
        "toy-still: 24 clips found, 8 classes",
        "unreadable 0, without picture 0, without sound 0, 0.03 hours, short 0, long 0"]
    listing = data.list_clips("toy-still", still, "test")
    assert [listing.classes[label] for label in (0, 3, 5)] == [
        "upright bounces", "upright pulses", "lying swings"]
    truths = np.load(still / "test" / "truth.npz")
    for i in (0, 13):
        frames, wave, truth = still_item(i, "test")
        clip = data.read_clip(listing.path(i), 0.0, 4.0, 40, 64, RATE)
        assert np.abs(clip["video"] - frames.astype(int)).mean() < 12
        assert np.corrcoef(clip["audio"], wave)[0, 1] > 0.9
        np.testing.assert_equal({key: truths[key][i] for key in truths}, truth)


def test_neither_world_is_taken_for_the_other(still, toy):
    for name, folder in (("toy", still), ("toy-still", toy)):
        with pytest.raises(UserError, match=f"another world than the {name} clips; remove it"):
            data.list_clips(name, folder)


def test_a_run_takes_the_toy_recipe_and_ends_with_the_table_of_the_set(still, tmp_path, monkeypatch, capsys):
    quicken_table(monkeypatch)
    words = f"--data toy-still --data-dir {still} --out {tmp_path} --steps 1 --size nano --batch-size 4"
    ajepa.main([*words.split(), "--workers", "0", "--device", "cpu"])
    assert "held-out toy-still clips, percent (N = 16)" in capsys.readouterr().out
    recipe = torch.load(tmp_path / "latest.pt")["recipe"]
    assert recipe["mel_patch"] == (32, 16) == ajepa.RECIPE["mel_patch"][1]
