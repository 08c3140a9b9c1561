"""Stable Diffusion 1.5 at its full size with random weights: speed and memory of loading, and three steps at 512x512 against diffusers.

By hand (some minutes, 2 GB of disk):  pytest -m slow tests/test_full_size_run.py -s
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from latentgen.models.card import published
from latentgen.models.load import Source, empty_module
from latentgen.pipelines import sd15
from test_family_sd15 import write_tokenizer

pytestmark = pytest.mark.slow
PROMPT, NEGATIVE, STEPS, SCALE = "a lighthouse at dusk, oil painting", "blurry", 3, 7.5
OURS = """
import json, resource, sys, time, torch, latentgen
import diffusers, transformers
def now(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
said = json.loads(sys.argv[1]); pipe = latentgen.load(said["folder"], dtype=said["dtype"], device="cpu", residency=said["residency"], progress=False)
pipe.checkpoint.check()
out = {"before": now("VmHWM")}
if said["load"]:
    from latentgen.models.load import load_part
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        parts = [load_part(pipe.checkpoint.sources[p.name], p, pipe.residency.dtype) for p in pipe.family.parts]
        seconds.append(time.perf_counter() - began)
        out.setdefault("loaded", now("VmHWM"))
        del parts
    out |= {"seconds": seconds, "weights": pipe.checkpoint.weight_bytes() / 2**20}
else:
    result = pipe.txt2img(said["prompt"], negative_prompt=said["negative"], steps=said["steps"], guidance_scale=said["scale"], seed=0, sampler="ddim", spacing="leading", width=512, height=512)
    torch.save(result.latents, said["out"])
    result.save(said["out"] + ".png")
    out |= {"timings": dict(result.timings), "peak": now("VmHWM")}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The whole architecture in float16, random, scaled so that activations stay near 1."""
    place, known, dice = tmp_path_factory.mktemp("full") / "sd15", published("sd15"), torch.Generator().manual_seed(0)
    for part in sd15.PARTS:
        module = empty_module(Source(part.name, (), known["parts"][part.name]), part)
        (place / part.name).mkdir(parents=True)
        (place / part.name / "config.json").write_text(json.dumps(known["parts"][part.name]))
        tensors = {}
        for name, p in module.state_dict().items():
            noise = torch.randn(p.shape, generator=dice)
            vector = 1 + 0.02 * noise if "norm" in name and name.endswith("weight") else 0.02 * noise
            tensors[name] = (vector if p.ndim == 1 else 0.7 * noise / p[0].numel() ** 0.5).half()
        save_file(tensors, place / part.name / ("model.safetensors" if part.cls.startswith("transformers") else "diffusion_pytorch_model.safetensors"), {"format": "pt"})
    (place / "scheduler").mkdir()
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(known["scheduler"]))
    (place / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    write_tokenizer(place / "tokenizer")
    return place


def ours(folder, out, **said):
    said = {"folder": str(folder), "prompt": PROMPT, "negative": NEGATIVE, "steps": STEPS, "scale": SCALE, "out": str(out), "load": False, "residency": "stage"} | said
    done = subprocess.run([sys.executable, "-c", OURS, json.dumps(said)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loading_costs_its_weights_once(folder, tmp_path, dtype):
    report = ours(folder, tmp_path / "x", load=True, dtype=dtype)
    print(dtype, report)
    assert report["loaded"] - report["before"] <= 1.1 * report["weights"]


def test_three_steps_against_diffusers(folder, tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    half = ours(folder, tmp_path / "half", dtype="bfloat16")
    whole = ours(folder, tmp_path / "whole", dtype="float32")
    print("bfloat16", half, "\nfloat32", whole)
    assert half["peak"] < 6 * 1024
    parts = {name: cls.from_pretrained(folder / name, torch_dtype=torch.float32, use_safetensors=True)
             for name, cls in {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}.items()}
    stock = StableDiffusionPipeline(**parts, tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"), scheduler=DDIMScheduler.from_pretrained(folder / "scheduler", set_alpha_to_one=True),
                                    safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    theirs = stock(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=SCALE, generator=torch.Generator("cpu").manual_seed(0), output_type="latent").images
    made = torch.load(tmp_path / "whole", weights_only=True)
    error = ((made - theirs).abs().max() / theirs.abs().max()).item()
    drift = ((torch.load(tmp_path / "half", weights_only=True) - theirs).pow(2).mean().sqrt() / theirs.pow(2).mean().sqrt()).item()
    print(f"latents: float32 {error:.1e} relative, bfloat16 {drift:.1e} root mean square")
    assert error < 1e-4
