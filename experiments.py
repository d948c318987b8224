"""The experiments of reproduce.py: the papers' tables as data.

An entry has a title, columns, rows {name: command line} and what of these there is to it:

    columns     {name: where its value lies}: STATE/MODALITY for a head on the embedding, STATE/attentive/
                MODALITY for one on the tokens, STATE/A->V/R@1 for retrieval, run/... for measures of the run.
                STATE is trained, untrained, raw input (the small table at the end of a toy run; on other sets
                reproduce.py adds the probes and searches that find the same), or a name of `after`.
    flags       of all rows; the user's replace them, a row's own stay. "--steps 3x": three times the steps.
    after       {STATE: steps that follow a training}; of a step on several checkpoints the value lies below
                STATE/500 and so on. {run} is the run's folder, any other {name} what --places gives: without
                it the step is left out and named. A row of probe.py trains nothing: its steps are its line
                with the flags of `after`, on --ckpt
    only        {row: the one modality that its encoder takes}
    toy         what replaces an entry's parts on the toy recipe, whose models and times are other ones
    paper       {row: {column: the paper's own number}}, and source: where it stands
    formats     of columns that are not percent, with a comma if the value is the same for all seeds
    panels      of the picture {title: (unit, columns, the column of chance)}; one of all columns otherwise
    against     {row: the rows that it is compared with}; the first row for those not named, None for no
                comparisons at all
    turned      the table stands on its side, a column for each row
    curves      {title: folder below a run's}: a picture of the log.jsonl there, a line for each row, the mean
                of its seeds. {data} is the set that is probed
A column with {step} in it stands for one of each checkpoint that the runs have kept.
"""

SOUND = "--modality audio"
PICTURE = "--modality video"
BOTH = "--modality av"
LINEAR = {"linear probe": "trained/audio", "linear probe, untrained": "untrained/audio"}
TUNE = "probe.py --probe finetune"
# one query for all methods, and two rates: MJEPA's own head, of four blocks, takes too long on two cores
QUICK = "probe.py --probe attentive --head attentive --lr 1e-3 1e-2"


def states(line, *modalities):
    """The steps that probe a finished run, and the same encoder untrained, on each of some modalities."""
    trained = [f"{line} {modality}" for modality in modalities]
    return {"trained": trained, "untrained": [f"{step} --baseline untrained" for step in trained]}


def asked_by(names, kind=""):
    """Columns {name: modality}, each with its untrained one."""
    columns = {name: f"trained/{kind}{modality}" for name, modality in names.items()}
    columns.update({f"{name}, untrained": f"untrained/{kind}{names[name]}" for name in names})
    return columns


def predictors(width):
    rows = {f"{depth} layers": f"ajepa.py --pred-depth {depth}" for depth in (2, 4, 6, 8)}
    # unspecified: its heads; here 32 wide, as the others'
    return {**rows, "6 layers, as wide as the encoder": f"ajepa.py --pred-depth 6 --pred-dim {width}"}


def sizes(**flags):
    """Each size, trained on pictures and with their sound, which is compared with the pictures alone."""
    rows = {}
    against = {}
    for name, flag in flags.items():
        rows[f"{name}, trained on video"] = f"avjepa_ncsu.py {flag} --modalities video"
        rows[f"{name}, trained on video + sound"] = f"avjepa_ncsu.py {flag}"
        against[f"{name}, trained on video + sound"] = [f"{name}, trained on video"]
    return dict(rows=rows, against=against, only={row: "video" for row in rows if "sound" not in row})


def ways(state, **measures):
    """Columns of retrieval, both ways."""
    columns = {}
    for way in ("A->V", "V->A"):
        columns.update({f"{name}, {way}": f"{state}/{way}/{key}" for name, key in measures.items()})
    return columns


A_V_AV = {"A": "audio", "V": "video", "AV": "av"}
MJEPA_HEAD = dict(                                      # the paper's: cross-attention, four blocks, linear
    columns=asked_by(A_V_AV, "attentive/"),
    after=states("probe.py --probe attentive", SOUND, PICTURE, BOTH))
MJEPA_TOY = dict(columns=asked_by(A_V_AV), after={})
BY_LIST = ways("list", **{"R@1 (list)": "R@1"})
SEARCH = {**ways("search", **{"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "median rank": "median_rank"}),
          "R@1, A->V, untrained": "search, untrained/A->V/R@1",
          "R@1, V->A, untrained": "search, untrained/V->A/R@1", **BY_LIST}
ABSENT = {"absent at zero": "avjepa_lejepa.py --absent zero",
          "absent dropped": "avjepa_lejepa.py --absent drop"}
GUESSES = {"decoder": "together/{}/decoder", "decoder, untrained": "together, untrained/{}/decoder",
           "from predictions alone": "apart/{}/decoder",
           "from predictions alone, untrained": "apart, untrained/{}/decoder",
           "mean image": "together/{}/mean", "nearest visible patch": "together/{}/nearest"}


def imagined(name, modality):
    """Columns of pixels.py: the errors where a modality was hidden."""
    return {f"{name}: {guess}": path.format(f"hidden/{modality}") for guess, path in GUESSES.items()}


VIDEO_IMAGINED = imagined("video", "video")
SOUND_IMAGINED = imagined("sound", "audio")
IMAGINED = {**VIDEO_IMAGINED, **SOUND_IMAGINED}


def over_steps(every, probe, kind=""):
    """Video alone at the checkpoints of a run, and of the untrained encoder as the first."""
    columns = {"step 0": f"untrained/{kind}video", "step {step:,}": f"kept/{{step}}/{kind}video"}
    after = {"kept": [f"{probe} {PICTURE} --ckpt {{run}}/step-*.pt"]}
    if kind:                                            # else the small table has it
        after["untrained"] = [f"{probe} {PICTURE} --baseline untrained"]
    return dict(flags=f"--keep-every {every}", columns=columns, after=after)


EXPERIMENTS = {
    # A-JEPA. Its tables are of the published description that we follow
    "ajepa-masking": dict(
        title="A-JEPA: what is hidden",
        columns=LINEAR,
        rows={"random patches, 75 %": "ajepa.py --masking random --mask-ratio 0.75",
              "time strips": "ajepa.py --masking time",
              "frequency strips": "ajepa.py --masking freq",
              "single block, 75 %": "ajepa.py --masking block --mask-ratio 0.75",
              "multi-block": "ajepa.py"},
        toy=dict(flags="--steps 500"),                  # half of the toy run, for 15 runs in 40 minutes
        source="Sec. 9, table of masking strategies, mAP on AudioSet-20K",
        paper={"random patches, 75 %": {"linear probe": 34.8},
               "time strips": {"linear probe": 35.9},
               "frequency strips": {"linear probe": 34.2},
               "single block, 75 %": {"linear probe": 36.0},
               "multi-block": {"linear probe": 37.2}}),
    "ajepa-ratio": dict(
        title="A-JEPA: how much is hidden",
        columns=LINEAR,
        rows={f"{ratio} %": f"ajepa.py --mask-ratio 0.{ratio // 10}" for ratio in range(40, 91, 10)},
        toy=dict(flags="--steps 500"),
        source="Sec. 9, table of masking ratios, mAP on AudioSet-20K",
        paper={"40 %": {"linear probe": 35.1},
               "50 %": {"linear probe": 36.0},
               "60 %": {"linear probe": 36.8},
               "70 %": {"linear probe": 37.2},
               "80 %": {"linear probe": 36.5},
               "90 %": {"linear probe": 34.9}}),
    "ajepa-predictor": dict(
        title="A-JEPA: layers and width of the predictor",
        columns=LINEAR,
        rows=predictors(768),
        toy=dict(flags="--steps 500", rows=predictors(128)),
        source="Sec. 9, table of predictor depths, mAP on AudioSet-20K",
        paper={"2 layers": {"linear probe": 35.4},
               "4 layers": {"linear probe": 36.5},
               "6 layers": {"linear probe": 37.2},
               "8 layers": {"linear probe": 36.9},
               "6 layers, as wide as the encoder": {"linear probe": 36.1}}),
    "ajepa-loss": dict(
        title="A-JEPA: distance of prediction and target",
        columns=LINEAR,
        rows={"smooth L1": "ajepa.py",
              "L2": "ajepa.py --loss l2",
              "L1": "ajepa.py --loss l1",
              "cosine": "ajepa.py --loss cosine"},
        toy=dict(flags="--steps 500"),
        source="Sec. 9, table of loss functions, mAP on AudioSet-20K",
        paper={"smooth L1": {"linear probe": 37.2},
               "L2": {"linear probe": 36.4},
               "L1": {"linear probe": 36.8},
               "cosine": {"linear probe": 36.0}}),
    "ajepa-curriculum": dict(
        title="A-JEPA: the paper's curriculum of masks, and regularised masking in fine-tuning",
        columns={**LINEAR,
                 "fine-tuned": "tuned/audio",
                 "fine-tuned, regularised masking": "regularised/audio"},
        rows={"multi-block": "ajepa.py",
              "curriculum": "ajepa.py --masking curriculum"},
        after={"tuned": [TUNE],
               "regularised": [f"{TUNE} --regularised-masking 0.1 --out {{run}}/regularised"]},
        source="second-hand, a digest of the paper, mAP on AudioSet-20K",
        paper={"curriculum": {"fine-tuned, regularised masking": 38.4}}),

    # AV-JEPA
    "avjepa-components": dict(
        title="AV-JEPA: local views and the two terms",
        columns={"linear probe": "trained/av",
                 "attentive probe": "trained/attentive/av",
                 "linear probe, untrained": "untrained/av"},
        flags="--batch-size 512 --accumulate 8 --epochs 50",                    # as the authors ran it
        rows={"modality-specific": "avjepa_lejepa.py",
              "random dropout": "avjepa_lejepa.py --local dropout",
              "masked joint local": "avjepa_lejepa.py --local masked",
              "joint local": "avjepa_lejepa.py --local joint",
              "audio-only": "avjepa_lejepa.py --local audio-only",
              "no local": "avjepa_lejepa.py --local none",
              "invariance only": "avjepa_lejepa.py --lam 0",
              "SIGReg only": "avjepa_lejepa.py --lam 1",
              "modality-specific, absent dropped": "avjepa_lejepa.py --absent drop"},
        after={"trained": [f"probe.py --probe attentive {BOTH}"]},
        # each modality alone, and retrieval, are in a toy run's small table anyway
        toy=dict(flags="--absent zero", after={"trained": [f"{QUICK} {BOTH}"]},
                 columns={"linear probe": "trained/av",
                          "attentive probe": "trained/attentive/av",
                          "linear probe, sound": "trained/audio",
                          "linear probe, picture": "trained/video",
                          **ways("trained", **{"R@10": "R@10"}),
                          "linear probe, untrained": "untrained/av"},
                 panels={"both": ("percent", ["linear probe", "attentive probe"], None),
                         "one alone": ("percent", ["linear probe, sound", "linear probe, picture"], None),
                         "retrieval": ("R@10, percent", ["R@10, A->V", "R@10, V->A"], None)}),
        source="page of the authors' next version, top-1 on VGGSound; their audio-only has no pictures in "
               "the global views either",
        paper={"modality-specific": {"linear probe": 43.9, "attentive probe": 47.1},
               "random dropout": {"linear probe": 38.1, "attentive probe": 41.3},
               "masked joint local": {"linear probe": 23.1, "attentive probe": 34.1},
               "joint local": {"linear probe": 13.7, "attentive probe": 24.7},
               "audio-only": {"linear probe": 14.1, "attentive probe": 22.5},
               "no local": {"linear probe": 10.3, "attentive probe": 23.2},
               "invariance only": {"linear probe": 1.2, "attentive probe": 1.1},
               "SIGReg only": {"linear probe": 0.3, "attentive probe": 1.2}}),
    "avjepa-retrieval": dict(
        title="AV-JEPA: sound to video and back, five clips of a class, or a list of ids",
        columns=SEARCH,
        rows=ABSENT,
        after={"search": ["retrieval.py"],
               "search, untrained": ["retrieval.py --untrained"],
               "list": ["retrieval.py --clips {ids}"]},
        toy=dict(title="AV-JEPA: sound to video and back, all held-out clips, or a list of ids",
                 after={"search": ["retrieval.py --clips all"],
                        "search, untrained": ["retrieval.py --clips all --untrained"],
                        "list": ["retrieval.py --clips {ids}"]}),
        formats={"median rank, A->V": ".1f", "median rank, V->A": ".1f"},
        panels={"R@1": ("percent", ["R@1, A->V", "R@1, V->A"], None),
                "R@10": ("percent", ["R@10, A->V", "R@10, V->A"], None)},
        source="authors' table, VGGSound, N = 1,545; dropped: their next version, ViT-B, list of 1,725 ids",
        paper={"absent at zero": {"R@1, A->V": 10.6, "R@5, A->V": 26.3, "R@10, A->V": 35.4,
                                  "R@1, V->A": 10.2, "R@5, V->A": 27.4, "R@10, V->A": 36.9,
                                  "median rank, A->V": 25, "median rank, V->A": 24},
               "absent dropped": {"R@1 (list), A->V": 10.5, "R@1 (list), V->A": 11.4}}),
    "avjepa-modalities": dict(
        title="AV-JEPA: one head on both modalities, tested with one of them absent",
        columns={**{f"fine-tuned, {name}": f"tuned/attentive/{m}" for name, m in A_V_AV.items()},
                 **{f"frozen, {name}": f"trained/attentive/{m}" for name, m in A_V_AV.items()}},
        rows=ABSENT,
        after={"tuned": [f"{TUNE} {BOTH}"],
               "trained": [f"probe.py --probe attentive {BOTH}"]},
        panels={"fine-tuned": ("percent", ["fine-tuned, A", "fine-tuned, V", "fine-tuned, AV"], None),
                "frozen": ("percent", ["frozen, A", "frozen, V", "frozen, AV"], None)},
        source="authors' table, AudioSet-2M, mAP; dropped: their next version, ViT-B, AudioSet-20K",
        paper={"absent at zero": {"fine-tuned, A": 26.0, "fine-tuned, V": 12.8, "fine-tuned, AV": 32.7},
               "absent dropped": {"frozen, A": 27.8, "frozen, V": 14.8, "frozen, AV": 31.0}}),

    # MJEPA. All numbers are second-hand, from a digest of the paper
    "mjepa-terms": dict(
        title="MJEPA: terms within and across. Matched in all rows: encoder, data, optimiser, masks; in the "
              "first five steps and clips; by 3x the steps the terms: one as often as three, three as nine",
        **MJEPA_HEAD,
        rows={"shared, within alone": "mjepa.py --terms intra",
              "separate, audio": "mjepa.py --terms separate-audio",
              "separate, video": "mjepa.py --terms separate-video",
              "and A<->V across": "mjepa.py --terms intra+av",
              "all nine": "mjepa.py",
              "separate, audio, 3x": "mjepa.py --terms separate-audio --steps 3x",
              "separate, video, 3x": "mjepa.py --terms separate-video --steps 3x",
              "shared, within alone, 3x": "mjepa.py --terms intra --steps 3x"},
        only={"separate, audio": "audio", "separate, audio, 3x": "audio",
              "separate, video": "video", "separate, video, 3x": "video"},
        # by steps, and by terms: those of "across" are fewer than its match's
        against=dict.fromkeys(["and A<->V across", "all nine"],
                              ["shared, within alone", "shared, within alone, 3x"]),
        toy=MJEPA_TOY,
        source="digest, ViT-L, mAP on AudioSet-20K",
        paper={"separate, audio": {"A": 30.87},
               "separate, video": {"V": 19.84},
               "shared, within alone": {"A": 28.70, "V": 17.90, "AV": 32.38},
               "and A<->V across": {"A": 33.52, "V": 19.58, "AV": 36.34},
               "all nine": {"A": 38.89, "V": 25.38, "AV": 42.90}}),
    "mjepa-size": dict(
        title="MJEPA: size of the encoder",
        **MJEPA_HEAD,
        rows={"ViT-B": "mjepa.py --size base",
              "ViT-L": "mjepa.py",
              "ViT-g": "mjepa.py --size giant"},
        toy=dict(MJEPA_TOY, rows={"nano": "mjepa.py --size nano", "toy": "mjepa.py"}),
        source="digest, mAP on AudioSet-20K, with VideoMix2M",
        paper={"ViT-L": {"A": 40.00, "V": 29.63, "AV": 45.31},
               "ViT-g": {"A": 40.97, "V": 29.82, "AV": 45.44}}),
    "mjepa-frozen": dict(
        title="MJEPA: one frozen encoder on many sets (seeds: of the heads)",
        against=None,                                   # other sets, not other encoders
        columns={name: f"trained/attentive/{modality}" for name, modality in A_V_AV.items()},
        rows={"AudioSet-20K": "probe.py --probe attentive --data audioset-20k --data-dir {audioset-20k}",
              "ESC-50": "probe.py --probe attentive --data esc50 --data-dir {esc50}",
              "FSD50K": "probe.py --probe attentive --data fsd50k --data-dir {fsd50k}",
              "Kinetics-400": "probe.py --probe attentive --data kinetics400 --data-dir {kinetics400}",
              "SSv2": "probe.py --probe attentive --data ssv2 --data-dir {ssv2}"},
        only={"ESC-50": "audio", "FSD50K": "audio", "Kinetics-400": "video", "SSv2": "video"},
        after={"trained": [SOUND, PICTURE, BOTH]},
        toy=dict(rows={"toy": f"{QUICK} --data toy", "toy-still": f"{QUICK} --data toy-still"}, only={}),
        source="digest, ViT-g, mAP; of ESC-50, Kinetics and SSv2 top-1",
        paper={"AudioSet-20K": {"A": 40.97, "V": 29.82, "AV": 45.44},
               "ESC-50": {"A": 96.9},
               "FSD50K": {"A": 65.8},
               "Kinetics-400": {"V": 85.0},
               "SSv2": {"V": 73.9}}),

    # AVJEPA of NC State, whose figures have no numbers
    "ncsu-sizes": dict(
        # the encoder trained with sound is asked without it as well: so the authors' code asks it
        title="AVJEPA: does sound help a small model?",
        columns=asked_by({"video alone": "video", "video + sound": "av"}, "attentive/"),
        **sizes(Tiny="--size tiny", Small="--size small", Base=""),
        # decoded anew each time: 7 of them are a sixth of the training
        after=states("probe.py --probe attentive --test-every 860", PICTURE, BOTH),
        curves={"pre-training (Fig. 3)": "",
                "the head's training, video alone (Fig. 4)": "attentive-{data}-video/seed0",
                "the head's training, video + sound": "attentive-{data}-av/seed0"},
        toy=dict(**sizes(nano="--size nano", toy=""), after=states(f"{QUICK} --test-every 100", PICTURE),
                 columns={**asked_by({"video alone": "video", "video + sound": "av"}),
                          **asked_by({"video alone, attentive": "video"}, "attentive/")})),
    "ncsu-pixels": dict(
        title="AVJEPA: what it imagines of hidden patches, squared error",
        columns=IMAGINED,
        formats=dict.fromkeys(IMAGINED, ".3f"),
        panels={"video": ("squared error", [*VIDEO_IMAGINED], None),
                "sound": ("squared error", [*SOUND_IMAGINED], None)},
        rows={"trained on video + sound": "avjepa_ncsu.py --size small",
              "trained on video": "avjepa_ncsu.py --size small --modalities video"},
        toy=dict(rows={"trained on video + sound": "avjepa_ncsu.py",
                       "trained on video": "avjepa_ncsu.py --modalities video"}),
        after={"together": ["pixels.py"],
               "together, untrained": ["pixels.py --baseline untrained"],
               "apart": ["pixels.py --decode apart"],
               "apart, untrained": ["pixels.py --decode apart --baseline untrained"]},
        curves={"the decoder's training (Fig. 5)": "pixels-{data}"}),
    "ncsu-curves": dict(
        title="AVJEPA: probes of video alone over the iterations of a run",
        rows={"trained on video": "avjepa_ncsu.py --modalities video",
              "trained on video + sound": "avjepa_ncsu.py"},
        **over_steps(250, "probe.py --probe attentive", "attentive/"),
        toy=over_steps(150, "probe.py")),

    "methods": dict(
        title="The four methods: frozen encoders on held-out clips, probes and retrieval (R@10)",
        columns={"linear probe, audio": "trained/audio",
                 "linear probe, audio, untrained": "untrained/audio",
                 "linear probe, audio, raw input": "raw input/audio",
                 "linear probe, video": "trained/video",
                 "linear probe, video, untrained": "untrained/video",
                 "linear probe, video, raw input": "raw input/video",
                 "linear probe, audio + video": "trained/av",
                 "linear probe, audio + video, untrained": "untrained/av",
                 "linear probe, audio + video, raw input": "raw input/av",
                 "10 labels a class, audio": "trained/few/audio",
                 "10 labels a class, audio, untrained": "untrained/few/audio",
                 "10 labels a class, audio, raw input": "raw input/few/audio",
                 "10 labels a class, video": "trained/few/video",
                 "10 labels a class, video, untrained": "untrained/few/video",
                 "10 labels a class, video, raw input": "raw input/few/video",
                 "10 labels a class, audio + video": "trained/few/av",
                 "10 labels a class, audio + video, untrained": "untrained/few/av",
                 "10 labels a class, audio + video, raw input": "raw input/few/av",
                 "attentive probe, audio": "trained/attentive/audio",
                 "attentive probe, audio, untrained": "untrained/attentive/audio",
                 "attentive probe, video": "trained/attentive/video",
                 "attentive probe, video, untrained": "untrained/attentive/video",
                 "attentive probe, audio + video": "trained/attentive/av",
                 "attentive probe, audio + video, untrained": "untrained/attentive/av",
                 "R@10, A->V": "trained/A->V/R@10",
                 "R@10, A->V, untrained": "untrained/A->V/R@10",
                 "R@10, V->A": "trained/V->A/R@10",
                 "R@10, V->A, untrained": "untrained/V->A/R@10",
                 "chance, probes": "chance/audio",
                 "chance, R@10": "chance/A->V/R@10",
                 "parameters of the encoder": "run/parameters of the encoder",
                 "parameters trained": "run/parameters trained",
                 "video tokens of a clip": "run/video tokens of a clip",
                 "audio tokens of a clip": "run/audio tokens of a clip",
                 "seconds a step": "run/seconds a step",
                 "minutes of training": "run/minutes of training",
                 "minutes of evaluation": "run/minutes of evaluation",
                 "minutes of the probes after": "run/minutes of the steps after"},
        formats={"chance, probes": ",.1f",
                 "chance, R@10": ",.1f",
                 "parameters of the encoder": ",.0f",
                 "parameters trained": ",.0f",
                 "video tokens of a clip": ",.0f",
                 "audio tokens of a clip": ",.0f",
                 "seconds a step": ".3f",
                 "minutes of training": ".1f",
                 "minutes of evaluation": ".1f",
                 "minutes of the probes after": ".1f"},
        panels={"linear probe": (
                    "percent",
                    ["linear probe, audio", "linear probe, video", "linear probe, audio + video"],
                    "chance, probes"),
                "attentive probe": (
                    "percent",
                    ["attentive probe, audio", "attentive probe, video", "attentive probe, audio + video"],
                    "chance, probes"),
                "retrieval": ("R@10, percent", ["R@10, A->V", "R@10, V->A"], "chance, R@10"),
                "time of a training step": ("seconds", ["seconds a step"], None)},
        against=None,                                   # rivals, no variants of the first
        turned=True,
        rows={"A-JEPA": "ajepa.py",
              "AV-JEPA": "avjepa_lejepa.py",
              "MJEPA": "mjepa.py",
              "AVJEPA (NC State)": "avjepa_ncsu.py"},
        only={"A-JEPA": "audio"},
        after=states(QUICK, SOUND, PICTURE, BOTH)),
}
