"""runtime.model.zoo: names to models, weights from a library, a file or a seed, and errors that say what to do."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from runtime.errors import ModelError
from runtime.model.weights import condition
from runtime.model.zoo import IMAGENET, load_model
from runtime.types import Preprocessing
from tests import models
from tests.splitting import same_bits

TINY = "tests.models:chain"
ROOT = Path(__file__).parent.parent


def states(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


# --- factories --------------------------------------------------------------------------------------------------------


def test_a_factorys_model_is_in_eval_mode_on_its_device_with_an_example_of_the_batch_size() -> None:
    for batch_size in (1, 2, 3):
        model = load_model(TINY, batch_size=batch_size)
        assert not model.module.training
        assert model.example.shape == (batch_size, 3, 32, 32)
        assert model.batch_size == batch_size
        assert (model.weights, model.preprocessing) == ("factory", None)
        assert all(not torch.equal(model.example[0], item) for item in model.example[1:])


def test_a_factory_runs_under_the_seed_and_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (load_model(TINY, seed=seed) for seed in (0, 0, 1))
    assert same_state(first.module.state_dict(), second.module.state_dict())
    assert same_bits(first.example, second.example)
    assert not same_state(first.module.state_dict(), other.module.state_dict())
    assert torch.equal(torch.rand(1), expected)


def test_a_factorys_own_weights_are_kept_unless_seeded_ones_are_asked_for() -> None:
    torch.manual_seed(0)
    own = models.Chain()
    assert same_state(load_model(TINY).module.state_dict(), own.state_dict())
    seeded = load_model(TINY, weights="seeded")
    assert seeded.weights == "seeded:0"
    assert not same_state(seeded.module.state_dict(), own.state_dict())


def bare() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def wrong_example() -> tuple[nn.Module, torch.Tensor, Preprocessing]:
    return models.Chain(), torch.zeros(1, 3, 30, 30), models.IMAGE


def failing() -> nn.Module:
    raise RuntimeError("no such disk")


def one_picture_only() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 1, 3), nn.Unflatten(0, (1, 1)))


def nothing() -> None:
    return None


number = 7


def test_a_module_alone_takes_imagenet_pictures() -> None:
    model = load_model("tests.test_runtime_model_zoo:bare")
    assert model.preprocessing == IMAGENET
    assert model.example.shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "expected torchvision:NAME, timm:NAME or package.module:factory, got 'resnet50'"),
        (":x", "expected torchvision:NAME"),
        ("no_such_package:f", "cannot import no_such_package: .*PYTHONPATH"),
        ("tests.models:chian", "has no function 'chian'; did you mean .*chain"),
        ("tests.test_runtime_model_zoo:number", "has no function 'number'"),
        ("tests.test_runtime_model_zoo:failing", "failing raised RuntimeError: no such disk"),
        ("tests.test_runtime_model_zoo:nothing", r"to return a module, \(module, example\) or .*, got NoneType"),
        ("tests.test_runtime_model_zoo:wrong_example", r"expected an example of shape \(N, 3, 32, 32\).*30, 30"),
        ("torchvision:resnet51", "torchvision has no model 'resnet51'; did you mean .*resnet50"),
        ("timm:darknet54", "timm has no model 'darknet54'; did you mean .*darknet53"),
        ("timm:qqqqqqqqqq", "see timm's list of models"),
        ("torchvision:fasterrcnn_resnet50_fpn", "does not take single images of one size; wrap it in a factory"),
    ],
)
def test_a_model_that_cannot_be_found_or_built_is_named(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size of 1 or more, got 0"),
        ({"device": "cuda:99"}, "cannot use device 'cuda:99'"),
        ({"device": "toaster"}, "cannot use device 'toaster'"),
        ({"weights": "pretrained"}, "weights 'pretrained' exist for torchvision and timm, not for tests.models:chain"),
        ({"spec": "tests.test_runtime_model_zoo:one_picture_only", "weights": "seeded"}, "fails on an input of shape"),
        ({"weights": "no/such.pt"}, "cannot read weights from no/such.pt"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(**{"spec": TINY, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_without_the_library_an_error_says_what_to_install_and_factories_still_work(library: str) -> None:
    code = (
        f"import sys; sys.modules['{library}'] = None\n"
        "from runtime.model.zoo import load_model\nfrom runtime.errors import ModelError\n"
        f"load_model('{TINY}')\n"
        f"try: load_model('{library}:resnet18')\nexcept ModelError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert found.stdout == f"{library} is not installed; run: pip install offcut[zoo]\n"


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_weights_come_from_a_file(tmp_path: Path, suffix: str, wrap: Callable[[object], object]) -> None:
    torch.manual_seed(9)
    state = states(models.Chain())
    path = tmp_path / f"chain{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(wrap(state), path)
    model = load_model(TINY, weights=str(path))
    assert same_state(model.module.state_dict(), state)
    assert model.weights == f"file:chain{suffix}"


def _without(state: dict[str, torch.Tensor]) -> object:
    return {name: tensor for name, tensor in state.items() if name != "head.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "missing head.bias, unknown none"),
        (lambda state: {**state, "extra": torch.ones(1)}, "missing none, unknown extra"),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, r"missing .* and \d+ more, unknown module"),
        (
            lambda state: {**state, "head.bias": torch.ones(3)},
            r"expected head.bias of shape \(10,\), got \(3,\)",
        ),
        (lambda state: [1, 2], "expected a state dict"),
        (lambda state: models.Chain(), "safetensors file, or torch.save of a state dict"),
    ],
)
def test_a_file_that_does_not_fit_names_the_keys(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    path = tmp_path / "bad.pt"
    torch.save(change(states(models.Chain())), path)
    with pytest.raises(ModelError, match=message):
        load_model(TINY, weights=str(path))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_file_that_is_no_weights_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"plain text, and long enough to be looked at")
    with pytest.raises(ModelError, match=f"cannot read weights from .*{name}"):
        load_model(TINY, weights=str(path))


def test_pretrained_weights_are_asked_of_the_library_and_a_failure_says_what_else_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # refused at once, with or without a network
    with pytest.raises(ModelError, match=r"pretrained weights of torchvision:squeezenet1_1: .*--weights seeded, or"):
        load_model("torchvision:squeezenet1_1", weights="pretrained")


def test_pretrained_weights_that_are_there_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(3)
    state = torchvision.models.squeezenet1_1().state_dict()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / url.rsplit("/", 1)[1])  # where an earlier download would have left them
    model = load_model("torchvision:squeezenet1_1", weights="pretrained")
    assert model.weights == "pretrained"
    assert same_state(model.module.state_dict(), dict(state))


# --- seeded weights ---------------------------------------------------------------------------------------------------


class Dead(nn.Module):
    """Everything that makes a fresh network answer alike: zero head, zero gains, tiny layer scale, fading signal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(12)))
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.gate = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(8, 100)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.head.weight)
        for block in self.deep:
            nn.init.normal_(block[0].weight, std=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.scale * self.deep(x)
        return self.head((self.gate + self.norm(x)).mean((2, 3)))


def dead() -> tuple[nn.Module, torch.Tensor, Preprocessing]:
    return Dead(), models.example(), models.IMAGE


def test_conditioning_makes_the_answer_depend_on_the_input() -> None:
    fresh = load_model("tests.test_runtime_model_zoo:dead", batch_size=8)
    seeded = load_model("tests.test_runtime_model_zoo:dead", batch_size=8, weights="seeded")
    with torch.no_grad():
        assert len(set(fresh.module(fresh.example).argmax(1).tolist())) == 1
        outputs = seeded.module(seeded.example)
    assert len(set(outputs.argmax(1).tolist())) >= 5
    assert 0.5 < outputs.std() < 2


def test_conditioning_takes_the_batchs_statistics_and_puts_the_norms_back() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=0.3)).eval()
    batch = 5 + 3 * torch.randn(8, 3, 16, 16)
    condition(module, batch)
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert (norm.momentum, norm.training) == (0.3, False)
    with torch.no_grad():
        outputs = module(batch)
    assert outputs.mean((0, 2, 3)).abs().max() < 1e-4
    assert (outputs.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert not module[0]._forward_hooks


def test_seeded_weights_do_not_depend_on_the_batch_size() -> None:
    first, second = (load_model(TINY, weights="seeded", batch_size=size) for size in (1, 12))
    assert same_state(first.module.state_dict(), second.module.state_dict())


def test_conditioning_leaves_the_processs_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    load_model("tests.test_runtime_model_zoo:dead", weights="seeded")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_1", "timm:mobilenetv3_small_050"])
def test_a_librarys_model_is_seeded_unless_told_otherwise(spec: str) -> None:
    pytest.importorskip(spec.partition(":")[0])
    model = load_model(spec, batch_size=4)
    assert model.weights == "seeded:0"
    assert model.preprocessing is not None
    with torch.no_grad():
        assert len(set(model.module(model.example).argmax(1).tolist())) > 1


def test_torchvisions_training_only_heads_are_left_out() -> None:
    pytest.importorskip("torchvision")
    from runtime.model.zoo import _build_torchvision

    built = _build_torchvision("googlenet", is_pretrained=False)
    assert not [name for name, _ in built.module.named_parameters() if name.startswith("aux")]


def test_timms_old_names_and_tags_still_name_models() -> None:
    pytest.importorskip("timm")
    from runtime.model.zoo import _build_timm

    assert _build_timm("mobilenetv3_small_050.lamb_in1k", is_pretrained=False).preprocessing is not None
    assert _build_timm("xception", is_pretrained=False).preprocessing == Preprocessing(
        299, 299, 333, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )


def test_a_process_gives_the_same_seeded_weights_at_its_first_load_as_later():
    # A process of its own: loading switches kernels that give other bits off, and must do so before it conditions.
    program = (
        "import torch; from torch import nn; from runtime.model.zoo import load_model\n"
        "a, b = (load_model('tests.models:attention', weights='seeded').module.state_dict() for _ in range(2))\n"
        "assert all(torch.equal(a[name], b[name]) for name in a)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
