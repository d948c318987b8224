"""harness.py: an encoder as HEAR and X-ARES ask for one; a long sound is what its chunks are alone."""
from dataclasses import asdict, replace

import pytest
import torch

import common
import data
import harness
from conftest import INPUTS, fails, same, write_checkpoint
from slow import random

PATCH = 16 * INPUTS.hop                                 # samples: 160 ms
CHUNK = 12 * PATCH                                      # whole patches in a view of 2 s
LENGTHS = {1600: 1, 16000: 7, CHUNK: 12, CHUNK + 1: 13, 3 * CHUNK: 36, 600 * 16000: 3750}


def squeezed(folder):
    """A checkpoint whose mel counts from the loudest and is interpolated, as that of AVJEPA of NC State."""
    content = common.load_checkpoint(write_checkpoint(folder, video=False))
    inputs = replace(INPUTS, log="db_max", interpolate=True, columns=INPUTS.mel_frames, hop=200)
    torch.save({**content, "inputs": asdict(inputs)}, folder / "latest.pt")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: model}: of sound alone, of a mel that is squeezed, and of both with CLS."""
    place = tmp_path_factory.mktemp("models")
    return {
        "mean": harness.load_model(write_checkpoint(place / "mean", video=False)),
        "squeezed": harness.load_model(squeezed(place / "squeezed")),
        "cls": harness.load_model(str(write_checkpoint(place / "cls", projector=[64, 8]) / "latest.pt"))}


def sound(samples, count=2, seed=0):
    return random(count, samples, seed=seed).mul(0.1).clamp(-1, 1)


# ---- the two interfaces ----------------------------------------------------------------------------------

def test_the_model_says_what_both_harnesses_ask_of_it(models):
    for model in models.values():
        assert isinstance(model, torch.nn.Module) and type(model).__name__.endswith("Encoder")
        assert model.sample_rate == model.sampling_rate == 16000
        for size in (model.scene_embedding_size, model.timestamp_embedding_size, model.output_dim):
            assert type(size) is int and size == 64
    assert models["mean"].hop_size_in_ms == models["cls"].hop_size_in_ms == 160
    assert models["squeezed"].hop_size_in_ms == pytest.approx(1000 * 2.0 * 16 / 201, abs=0.01)


@pytest.mark.parametrize("samples", LENGTHS)
def test_sound_of_any_length_has_an_embedding_for_each_patch_that_has_begun(samples, models):
    model = models["mean"]
    wave = sound(samples, 1)
    embeddings = model(wave[0])
    assert embeddings.shape == (1, LENGTHS[samples], 64) and embeddings.dtype == torch.float32
    assert embeddings.isfinite().all() and not embeddings.requires_grad
    if samples < 60 * 16000:
        scene = harness.get_scene_embeddings(wave, model)
        assert scene.shape == (1, 64) and scene.dtype == torch.float32
        assert same(model(wave), embeddings)


@pytest.mark.parametrize("name", ["mean", "squeezed"])
@pytest.mark.parametrize("samples", [*LENGTHS][:-1])
def test_timestamps_are_evenly_spaced_milliseconds_within_the_sound(samples, name, models):
    model = models[name]
    embeddings, times = harness.get_timestamp_embeddings(sound(samples), model)
    assert embeddings.dtype == times.dtype == torch.float32 and embeddings.shape == (*times.shape, 64)
    assert same(embeddings, model(sound(samples))[:, :times.shape[1]])
    assert same(times[0], times[1]) and times[0, 0] == pytest.approx(
        model.hop_size_in_ms / 2 - 500 * model.inputs.hop / 16000)
    torch.testing.assert_close(times.diff(), torch.full((2, times.shape[1] - 1), model.hop_size_in_ms))
    assert 0 < samples / 16 - times[0, -1] <= model.hop_size_in_ms


@pytest.mark.parametrize("name, off", [("mean", 0.05), ("squeezed", 0.5)])
def test_a_timestamp_is_the_middle_of_what_its_embedding_is_made_of(name, off, models):
    """A click at that time lies in the middle of the columns of its patch."""
    model = models[name]
    _, times = harness.get_timestamp_embeddings(sound(CHUNK - 500), model)
    for number in (1, 6, 10):
        wave = torch.zeros(1, model.samples)
        wave[0, round(times[0, number].item() * 16)] = 1
        power = data.LogMel(replace(model.inputs, log="db", columns=12 * 16))(wave)[0, 0]       # (F, T)
        power = 10 ** ((power * model.inputs.mel_std + model.inputs.mel_mean) / 10)
        power = power.sum(0) - power.sum(0).min()
        middle = (power * torch.arange(12 * 16)).sum() / power.sum()
        assert middle.item() == pytest.approx(16 * number + 7.5, abs=off)


# ---- chunks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mean", "squeezed", "cls"])
def test_a_long_sound_has_at_each_chunk_the_embeddings_of_that_chunk_alone(name, models):
    model = models[name]
    wave = sound(2 * model.samples + 5000)
    times, scene = model.encode(wave)
    assert times.shape[1] == 2 * 12 + 2
    total = 0
    for start in (0, 1, 2):
        chunk = wave[:, start * model.samples:(start + 1) * model.samples]
        alone, embedding = model.encode(chunk)
        assert same(times[:, 12 * start:12 * (start + 1)], alone)
        total = total + len(alone[0]) * embedding
    torch.testing.assert_close(scene, total / 26)
    if name != "cls":                                   # the mean over time
        torch.testing.assert_close(scene, times.mean(1))


@pytest.mark.parametrize("name", ["mean", "cls"])
def test_a_chunk_has_what_the_encoder_says_of_the_mel_that_the_reader_makes_of_it(name, models):
    model = models[name]
    wave = sound(32000)[:, :CHUNK]
    mel = data.LogMel(INPUTS)(wave)                     # (2, 1, 32, 193)
    tokens, embedding = model.encoder(audio=mel)        # two rows of 12
    times, scene = model.encode(wave)
    for t in range(12):
        torch.testing.assert_close(times[:, t], (tokens[:, t] + tokens[:, 12 + t]) / 2)
    torch.testing.assert_close(scene, embedding)


def test_the_end_is_filled_up_with_silence(models):
    for model in models.values():
        wave = sound(3000)
        longer = torch.cat([wave, torch.zeros(2, 2 * model.samples // 12 - 3000)], 1)       # two patches
        for short, long in zip(model.encode(wave), model.encode(longer)):
            torch.testing.assert_close(short, long)


def test_sounds_of_a_batch_do_not_see_each_other_and_the_encoder_never_hears_more_than_a_chunk(models):
    wave = sound(CHUNK + 9000)
    for model in models.values():
        heard = []
        hook = model.encoder.register_forward_pre_hook(
            lambda module, args, given, heard=heard: heard.append(given["audio"].shape[-1]), with_kwargs=True)
        both = model.encode(wave)
        hook.remove()
        assert len(heard) == 2 and max(heard) == 12 * 16
        for number in (0, 1):
            for of_both, alone in zip(both, model.encode(wave[number:number + 1])):
                torch.testing.assert_close(of_both[number], alone[0], atol=1e-5, rtol=1e-4)


# ---- what is refused -------------------------------------------------------------------------------------

def test_an_encoder_without_sound_and_sound_of_several_channels_are_refused(models, tmp_path):
    silent = write_checkpoint(tmp_path, audio=False)
    fails(harness.load_model, silent, match="trained without sound; give a checkpoint that was trained")
    fails(harness.load_model, tmp_path / "nothing.pt", match="there is no such checkpoint")
    fails(models["mean"], torch.zeros(2, 2, 8000), match="give one channel")
