import pytest
import torch
from safetensors.torch import save_file

from prefgen.errors import CheckpointError
from prefgen.models.projector import ProjectorShape, SemProjector, load_projector, save_projector


def _projector(sem_width=12, text_width=5, hidden_width=16):
    torch.manual_seed(0)
    return SemProjector(ProjectorShape(sem_width=sem_width, text_width=text_width, hidden_width=hidden_width))


def _sets(count=200):
    generator = torch.Generator().manual_seed(1)
    sem = torch.randn(count, 12, generator=generator)
    sem[:, 3] = sem[:, 3] * 500 + 4000
    sem[:, 7] = 2.5
    text = torch.randn(count, 5, generator=generator) * 3 + 10
    return sem, text


def test_output_starts_near_the_text_cloud():
    projector = _projector()
    sem, text = _sets()
    projector.standardise(sem, text=text)
    aligned = projector(sem)
    assert aligned.shape == (200, 5)
    assert (aligned.mean(dim=0) - text.mean(dim=0)).norm() < text.std(dim=0).norm()


def test_one_huge_and_one_constant_coordinate_do_not_rule():
    projector = _projector()
    sem, text = _sets()
    projector.standardise(sem, text=text)
    inside = (sem - projector.sem_mean) / projector.sem_scale
    assert torch.isfinite(projector(sem)).all()
    torch.testing.assert_close(inside[:, 3].std(), torch.tensor(1.0), rtol=1e-3, atol=0)
    assert inside[:, 7].abs().max() == 0


def test_text_geometry_is_scaled_by_one_number():
    projector = _projector()
    sem, text = _sets()
    projector.standardise(sem, text=text)
    assert projector.text_scale.shape == ()
    spread = (text - text.mean(dim=0)).pow(2).mean().sqrt()
    torch.testing.assert_close(projector.text_scale, spread, rtol=1e-4, atol=0)


def test_statistics_travel_in_the_state_dict():
    projector, other = _projector(), _projector()
    sem, text = _sets()
    projector.standardise(sem, text=text)
    assert not torch.equal(projector(sem), other(sem))
    other.load_state_dict(projector.state_dict())
    assert torch.equal(projector(sem), other(sem))


@pytest.mark.parametrize("width", [0, -1, True, 2.0, 1 << 30])
def test_shape_from_a_header_is_checked(width):
    with pytest.raises(CheckpointError, match="sem_width must be a whole number"):
        ProjectorShape(sem_width=width, text_width=5, hidden_width=16)


def test_file_gives_the_same_numbers_back(tmp_path):
    projector = _projector()
    sem, text = _sets()
    projector.standardise(sem, text=text)
    path = tmp_path / "new" / "projector.safetensors"
    save_projector(projector, path=path, lineage={"mllm": "ab"}, text={"text_pooling": "pooled"})
    loaded = load_projector(path)
    assert torch.equal(loaded.projector(sem), projector(sem))
    assert (loaded.lineage, loaded.text) == ({"mllm": "ab"}, {"text_pooling": "pooled"})
    assert not any(parameter.requires_grad for parameter in loaded.projector.parameters())
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_absent_torn_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "projector.safetensors"
    with pytest.raises(CheckpointError, match="no projector at .* fit --stage align"):
        load_projector(path)
    save_projector(_projector(), path=path, lineage={}, text={})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is no projector or torn"):
        load_projector(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="is no projector of version 1"):
        load_projector(path)
