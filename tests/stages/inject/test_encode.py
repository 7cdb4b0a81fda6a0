"""Encoded beforehand or while training: the same loss; and an encoding that was interrupted."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.cli import main
from prefgen.data.encoded import EncodedReader
from prefgen.data.verify import verify
from prefgen.errors import CheckpointError, DataError
from prefgen.stages.inject import encode
from prefgen.stages.inject.data import InjectData
from prefgen.stages.inject.encode import encode_shards
from prefgen.stages.inject.module import InjectModule
from prefgen.testing.data import make_embeddings


@pytest.fixture(scope="module")
def encoded(workdir, tmp_path_factory):
    """The workdir's histories in both number formats."""
    from prefgen.config import build_config
    from prefgen.stages.inject.config import InjectConfig

    out = tmp_path_factory.mktemp("encoded")
    settings = [f"workdir={workdir}", "run_dir=x", f"model.pipeline={workdir / 'pipeline'}"]
    settings += ["model.memory_format=contiguous", "data.batch_size=4"]
    config = build_config(InjectConfig, where="here", file=None, overrides=settings)
    for stored_as in ("float32", "float16"):
        encode_shards(config, out=out / stored_as, stored_as=stored_as)
    return out


def losses(config):
    module = InjectModule(config)
    data = InjectData(config, image_size=module.bundle.image_size)
    rows = data.statistics()
    module.adapter.fusion.standardise(module._parts(sem=rows["sem"], core=rows["core"], image=rows["image"]))
    with torch.no_grad():
        return torch.cat(
            [
                module._losses(module._noised(batch), users=module._tokens(batch))
                for batch in data.train_dataloader()
            ]
        )


# Encoding in another batch rounds differently, and half precision keeps 11 bits.
@pytest.mark.parametrize(("stored_as", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_the_loss_is_that_of_encoding_while_training(make_config, encoded, stored_as, tolerance):
    drops = ("inject.text_drop_rate=0.3", "data.cache_latents=false", "data.cache_text=false")
    fresh = losses(make_config(*drops))
    kept = losses(make_config(*drops, f"data.encoded={encoded / stored_as}"))
    assert len(fresh) >= 12
    torch.testing.assert_close(kept, fresh, rtol=tolerance, atol=tolerance)


def test_training_reads_no_picture(make_config, encoded, tmp_path, monkeypatch):
    from prefgen.run import fit
    from prefgen.run_noise import quiet_lightning
    from prefgen.stages.inject import data

    monkeypatch.setattr(data, "decode_image", lambda *_, **__: pytest.fail("a picture was decoded"))
    config = make_config(
        f"data.encoded={encoded / 'float16'}",
        "trainer.max_steps=3",
        "inject.sample_every_n_steps=1",
        "data.max_eval_users=4",
    )
    with quiet_lightning():
        fit(config, make_module=lambda: InjectModule(config), make_data=lambda: InjectData(config))
    assert list((tmp_path / "run" / "samples").glob("*.png")), "the grid shows the targets all the same"


def test_an_interrupted_encoding_goes_on_and_ends_with_the_same_bytes(
    make_config, encoded, tmp_path, monkeypatch
):
    config = make_config()
    whole, calls = encode.encode_user, []

    def stop(sample, **how):
        calls.append(sample.user_id)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return whole(sample, **how)

    out = tmp_path / "set"
    monkeypatch.setattr(encode, "encode_user", stop)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(config, out=out)
    assert not (out / "index.json").exists()
    done = {path.name for path in out.glob("*.tar")}
    assert len(done) == 2, "eight users, three a shard: two shards are whole"
    assert not list(out.glob(".*.tmp"))
    calls.clear()
    monkeypatch.setattr(encode, "encode_user", lambda sample, **h: calls.append(1) or whole(sample, **h))
    index = encode_shards(config, out=out)
    assert len(calls) == 28 - 6, "what was whole is not encoded again"
    other = json.loads((encoded / "float16" / "index.json").read_text())
    assert json.loads((out / "index.json").read_text())["splits"] == other["splits"]
    assert not (out / ".encode").exists()
    calls.clear()
    assert encode_shards(config, out=out) == index
    assert not calls, "a finished set is left alone"
    assert verify(out, num_workers=1).problems == ()


def test_a_set_of_other_encoders_is_refused(make_config, encoded, tmp_path):
    other = make_config(f"data.encoded={encoded / 'float16'}", "model.vae_dtype=bfloat16")
    with pytest.raises(CheckpointError, match="vae_dtype is 'float32' but 'bfloat16' is expected"):
        InjectModule(other)
    with pytest.raises(DataError, match="encoded with another vae_dtype; pass another folder"):
        encode_shards(make_config("model.vae_dtype=bfloat16"), out=encoded / "float16")
    missing = make_config("data.encoded=nowhere")
    assert any(needed.key == "data.encoded" for needed in missing.required_inputs())


def test_users_and_images_that_were_not_encoded_are_named(make_config, encoded, tmp_path):
    reader = EncodedReader(encoded / "float16", split="train")
    with pytest.raises(DataError, match="has no liked image 99 of user"):
        reader.image(next(reader.users()), position=99)
    embeddings = make_embeddings(
        tmp_path / "e", num_users=60, num_images=8, core_dim=10, sem_dim=6, image_dim=12
    )
    config = make_config(f"data.encoded={encoded / 'float16'}", f"data.embeddings={embeddings}")
    with pytest.raises(DataError, match="is not in .*prefgen data encode"):
        InjectData(config, image_size=(16, 16)).users("train")


def test_the_command(make_config, workdir, tmp_path, capsys):
    out = tmp_path / "set"
    words = ["data", "encode", "--out", str(out), f"workdir={workdir}", "trainer.accelerator=cpu"]
    words += [f"model.pipeline={workdir / 'pipeline'}", "data.batch_size=4"]
    assert main(words) == 0
    assert f"train with data.encoded={out}" in capsys.readouterr().out
    assert main(["data", "inspect", str(out)]) == 0
    assert "encoded, schema version" in capsys.readouterr().out
    assert main(["data", "encode", f"workdir={tmp_path / 'none'}"]) == 2
    assert "no history shards at" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photographs(workdir, tmp_path_factory):
    """The workdir's users with pictures of three shapes."""
    from prefgen.data.images import encode_webp
    from prefgen.data.shards import read_histories, write_shards
    from prefgen.testing.data import write_raw

    folder = tmp_path_factory.mktemp("photographs")
    history = write_raw(folder, num_users=28, num_liked=8, num_disliked=6)
    rng = np.random.default_rng(0)
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        size = ((24, 24), (24, 12), (12, 24))[number % 3]
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        path.write_bytes(encode_webp(Image.fromarray(pixels)))
    write_shards(read_histories(history), root=folder, out=folder / "shards", users_per_shard=3)
    return folder / "shards"


@pytest.mark.parametrize("beforehand", [pytest.param(False, marks=pytest.mark.slow), True])
def test_photographs_keep_their_shape_in_batches_of_one_size(make_config, photographs, tmp_path, beforehand):
    settings = [f"data.shards={photographs}", "data.max_aspect_ratio=2", "data.batch_size=2"]
    if beforehand:
        encode_shards(make_config(*settings), out=tmp_path / "set", stored_as="float32")
        settings.append(f"data.encoded={tmp_path / 'set'}")
    config = make_config(
        *settings, "inject.sample_every_n_steps=1", "trainer.max_steps=6", "data.max_eval_users=6"
    )
    from prefgen.run import fit
    from prefgen.run_noise import quiet_lightning

    modules, shapes = [], []

    class Watched(InjectModule):
        def _noised(self, batch, **times):
            noised = super()._noised(batch, **times)
            shapes.append(tuple(noised.latents.shape[-2:]))
            return noised

    def make_module():
        modules.append(Watched(config))
        return modules[-1]

    with quiet_lightning():
        fit(config, make_module=make_module, make_data=lambda: InjectData(config))
    assert (16, 16) in modules[0].buckets
    assert len(modules[0].buckets) > 2
    assert len(set(shapes)) > 1
    assert {(2 * h, 2 * w) for h, w in shapes} <= set(modules[0].buckets)


@pytest.mark.slow
def test_a_batch_of_photographs_is_the_same_beforehand_and_while_training(make_config, photographs, tmp_path):
    settings = [f"data.shards={photographs}", "data.max_aspect_ratio=2", "data.batch_size=2"]
    encode_shards(make_config(*settings), out=tmp_path / "set", stored_as="float32")
    found = []
    for more in ([], [f"data.encoded={tmp_path / 'set'}"]):
        config = make_config(*settings, *more, "data.cache_latents=false")
        module, data = InjectModule(config), InjectData(config)
        data.sizes = lambda buckets=module.buckets: buckets
        batches = list(data.train_dataloader())
        assert len(batches) > 0
        found.append((batches, [module.moments(batch).mean for batch in batches]))
    (fresh, means), (kept, again) = found
    assert [batch.keys for batch in fresh] == [batch.keys for batch in kept]
    for one, two in zip(means, again, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
