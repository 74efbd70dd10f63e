"""Small models and little data, so that whole runs take seconds."""

import dataclasses

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.learning.data import DataConfig, Synthetic, Target
from sjepa_deploy.learning.finetune import FinetuneConfig
from sjepa_deploy.learning.loop import Engine
from sjepa_deploy.learning.masking import Masking
from sjepa_deploy.learning.pretrain import PretrainConfig
from sjepa_deploy.spec import EncoderSpec, ModelSpec

ENCODER = EncoderSpec(
    conv_layers=((8, 32, 8), (16, 2, 2), (16, 2, 2), (16, 2, 2), (16, 2, 2)),
    spat_dim=6,
    time_dim=10,
    n_layers=2,
    n_decoder_layers=1,
    n_heads=2,
)
CH_NAMES = read_montage("sjepa-62").ch_names[::4]  # 16 channels
DATA = DataConfig(montage="sjepa-62", ch_names=CH_NAMES, n_times=152, synthetic=Synthetic(n_subjects=5, n_windows=16))
ENGINE = Engine(max_epochs=4, batch_size=16, accelerator="cpu")
PRETRAIN = PretrainConfig(
    data=DATA, encoder=ENCODER, masking=Masking(radius=0.8), engine=dataclasses.replace(ENGINE, weight_decay=0.01)
)
FINETUNE = FinetuneConfig(
    variant="contextual",
    encoder=ENCODER,
    warmup_epochs=2,
    data=dataclasses.replace(DATA, target=Target()),
    engine=ENGINE,
)


def make_spec(variant="base", ch_names=CH_NAMES, **changes) -> ModelSpec:
    montage = read_montage("sjepa-62").pick(ch_names)
    fields = {
        "variant": variant,
        "n_chans": len(ch_names),
        "n_times": 152,
        "sfreq": 100.0,
        "ch_names": montage.ch_names,
        "positions": montage.positions,
        "phase": "zero-phase",
        "encoder": ENCODER,
    }
    return ModelSpec.of(**(fields | changes))
