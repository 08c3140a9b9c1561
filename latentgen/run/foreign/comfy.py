"""ComfyUI's graphs as fields of a request. Knows nodes by what their inputs are called, so that nodes of extensions are followed too; no files.

A picture holds the graph that ran (`prompt`: node id -> class and inputs) and the one on the screen (`workflow`: nodes, links, values of widgets).
From the picture that was saved, links are followed back to the first sampler, and from there to its texts, model and size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from latentgen.run.foreign.fields import Foreign, Found, base_name, merging, number, whole
from latentgen.run.foreign.guiders import known_node, plus_plus, take_node
from latentgen.run.foreign.hires import same_factor, take_upscaler

Node = Mapping[str, Any]
Graph = Mapping[str, Node]
MOST_NODES = 5000
_TEXTS = {"text", "text_g", "text_l", "clip_l", "t5xxl", "prompt", "string"}
_CONDITIONERS = ("Reroute", "ConditioningZeroOut", "ConditioningCombine", "ConditioningConcat")  # of which `texts` tells
_GUIDERS = ("BasicGuider", "CFGGuider", "PerpNegGuider")
_ENDS = {"sigma_max": 14.614642, "sigma_min": 0.0291675, "rho": 7, "beta_d": 19.9, "beta_min": 0.1, "alpha": 0.6,
         "beta": 0.6}  # as the nodes have them
_PICTURES = ("images", "image", "samples", "pixels", "latent")
_FINISHED = ("VAEDecode", "Save", "Preview", "Reroute", "ImageSave")  # begin the names of nodes that leave a picture as it is
_LATENTS = ("Empty", "VAEEncode", "Load", "Reroute", "SetLatentNoiseMask", "InpaintModelConditioning", "LatentUpscale", "ImageScale", "Image", "Mask")
_LATENT = ("latent_image", "samples", "latent", "optional_latent")
_CONDITIONING = ("conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from", "positive")
_WIDGETS = {  # names of the values that older workflows list without them; None is a button of the screen
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", None, "steps", "cfg", "sampler_name", "scheduler", "start_at_step", "end_at_step",
                         "return_with_leftover_noise"),
    "SamplerCustom": ("add_noise", "noise_seed", None, "cfg"), "KSamplerSelect": ("sampler_name",), "RandomNoise": ("noise_seed",),
    "BasicScheduler": ("scheduler", "steps", "denoise"), "CFGGuider": ("cfg",), "CLIPTextEncode": ("text",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "CheckpointLoaderSimple": ("ckpt_name",), "EmptyLatentImage": ("width", "height", "batch_size"), "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"), "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "LoadImage": ("image",), "ConditioningZeroOut": (), "LatentUpscale": ("upscale_method", "width", "height", "crop"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"), "ImageScale": ("upscale_method", "width", "height", "crop"),
    "ImageScaleBy": ("upscale_method", "scale_by"),
    "ControlNetLoader": ("control_net_name",), "PrimitiveNode": ("value",), "VAELoader": ("vae_name",), "RescaleCFG": ("multiplier",),
}


def from_prompt(data: Mapping[str, Any]) -> Foreign | None:
    """The graph that ran, None for one without a sampler that is known by its inputs."""
    graph = {str(key): node for key, node in list(data.items())[:MOST_NODES] if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    sampler, later = _first_sampler(graph)
    if sampler is None:
        return None
    found = Found("ComfyUI")
    reader = _Reader(graph, found)
    reader.read(sampler)
    if len(later) == 1 and reader.larger(sampler, later[0]):
        later = []
    _afterwards(graph, found)
    for node in later:
        steps, denoise = (_value(graph, node["inputs"].get(name)) for name in ("steps", "denoise"))
        found.note(f"a later pass of {node.get('class_type')} ({steps} steps, denoise {denoise}) was not taken over: this is the first pass")
    return found.done()


def from_workflow(data: Mapping[str, Any]) -> Foreign | None:
    """The graph on the screen, read as the one that ran; None where it has no sampler."""
    nodes, links = data.get("nodes"), data.get("links")
    if not isinstance(nodes, list) or not isinstance(links, list):
        return None
    origins: dict[Any, list[Any]] = {}
    for link in links[:10 * MOST_NODES]:
        if isinstance(link, dict):
            origins[str(link.get("id"))] = [str(link.get("origin_id")), link.get("origin_slot")]
        elif isinstance(link, list) and len(link) >= 3:
            origins[str(link[0])] = [str(link[1]), link[2]]
    ran = [node for node in nodes[:MOST_NODES] if isinstance(node, dict) and node.get("mode") != 2]
    return from_prompt({str(node.get("id")): _as_ran(node, origins) for node in ran})


def _as_ran(node: Node, origins: Mapping[Any, list[Any]]) -> dict[str, Any]:
    """A node of the screen with its inputs by name: widgets' values, and links, which go before them. One that is bypassed (mode 4) only hands on."""
    given = node.get("inputs")
    slots = [slot for slot in (given if isinstance(given, list) else []) if isinstance(slot, dict) and isinstance(slot.get("name"), str)]
    linked = {slot["name"]: origins[str(slot["link"])] for slot in slots if str(slot.get("link")) in origins}
    if node.get("mode") == 4:
        return {"class_type": "Reroute", "inputs": linked}
    kind, values = str(node.get("type")), node.get("widgets_values")
    own: dict[str, Any] = dict(values) if isinstance(values, dict) else {}
    if isinstance(values, list):
        names = _WIDGETS.get(kind)
        if names is None:
            names = tuple(slot["name"] for slot in slots if isinstance(slot.get("widget"), dict))
            names = names or (("text",) if kind.startswith("CLIPTextEncode") else ())
        if kind.startswith("Empty") and "Latent" in kind:
            names = _WIDGETS["EmptyLatentImage"]
        own = {name: value for name, value in zip(names, values, strict=False) if name}
    return {"class_type": kind, "inputs": own | linked}


def _is_sampler(node: Node) -> bool:
    inputs = node["inputs"]
    return "latent_image" in inputs and ("guider" in inputs or "positive" in inputs) and bool({"sampler_name", "sampler"} & {*inputs})


def _links(node: Node, names: tuple[str, ...] | None = None) -> Iterator[str]:
    """Ids of the nodes that a node's inputs come from."""
    for name, value in node["inputs"].items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and (names is None or name in names):
            yield str(value[0])


def _upstream(graph: Graph, start: list[str], names: tuple[str, ...] | None = None) -> Iterator[Node]:
    """Every node that `start` hangs on, nearest first, each once: a graph from a file may run in circles."""
    seen, todo = set(), list(start)
    for key in todo:  # grows while it is walked
        if key in seen or key not in graph:
            continue
        seen.add(key)
        yield graph[key]
        todo.extend(_links(graph[key], names))


def _ends(graph: Graph) -> list[str]:
    """The nodes that feed none, those that save before the rest."""
    fed = {key for node in graph.values() for key in _links(node)}
    return sorted((key for key in graph if key not in fed), key=lambda key: "Save" not in str(graph[key].get("class_type")))


def _afterwards(graph: Graph, found: Found) -> None:
    """Notes on what stands between the last sampler and the picture that was saved."""
    for end in _ends(graph):
        todo, seen, between, sampled = [end], set(), [], False
        for key in todo:  # grows while it is walked
            node = graph.get(key)
            if node is None or key in seen:
                continue
            seen.add(key)
            if _is_sampler(node):
                sampled = True
                continue
            between.append(node)
            todo += _links(node, _PICTURES)
        if not sampled:
            continue
        for node in between:
            kind = str(node.get("class_type"))
            if not kind.startswith(_FINISHED) and {*_links(node, _PICTURES)}:
                found.note(f"the node {kind} changes the finished picture, which has no equivalent here")
            vae = next((graph[key] for key in _links(node, ("vae",)) if key in graph), None)
            if vae is not None and isinstance(name := _value(graph, vae["inputs"].get("vae_name")), str):
                found.note(f"VAE {base_name(name)!r} was used: where it is not the model's own, load it beside the model (vae=)")
        return


def _first_sampler(graph: Graph) -> tuple[Node | None, list[Node]]:
    """The sampler that worked first on the way to the saved picture, and those after it, last one first."""
    for end in _ends(graph):
        last = next((node for node in _upstream(graph, [end]) if _is_sampler(node)), None)
        if last is not None:
            chain = [last, *(n for n in _upstream(graph, list(_links(last, _LATENT)), (*_LATENT, "pixels", "image", "images", "upscaled"))
                             if _is_sampler(n) and n is not last)]
            return chain[-1], chain[:-1]
    return None, []


def _value(graph: Graph, value: Any) -> Any:
    """An input's own value, or where it is linked, that of the node that makes it, if that is one value alone."""
    for _ in range(32):
        if not isinstance(value, list):
            return value
        node = graph.get(str(value[0])) if len(value) == 2 else None
        if node is None:
            return None
        inputs = node["inputs"]
        named = [inputs[name] for name in ("value", "seed", "noise_seed", "text", "string", "STRING", "int", "float", "Number", "Text")
                 if name in inputs]
        value = next(iter(named or [v for v in inputs.values() if isinstance(v, list)]), None)
    return None


class _Reader:
    """One graph, read from its sampler into `found`."""

    def __init__(self, graph: Graph, found: Found) -> None:
        self.graph, self.found = graph, found

    def said(self, node: Node | None, *names: str) -> Any:
        """The first of these inputs that a node has, as a value."""
        return next((_value(self.graph, node["inputs"][name]) for name in names if node is not None and name in node["inputs"]), None)

    def behind(self, node: Node, name: str) -> Node | None:
        """The node that an input comes from, past those that only hand on."""
        for _ in range(64):
            value = node["inputs"].get(name)
            following = self.graph.get(str(value[0])) if isinstance(value, list) and len(value) == 2 else None
            if following is None or following.get("class_type") != "Reroute" or not following["inputs"]:
                return following
            node, name = following, next(iter(following["inputs"]))
        return None

    def read(self, sampler: Node) -> None:
        """Everything that hangs on the sampler."""
        found, guider = self.found, self.behind(sampler, "guider") or sampler
        sigmas = self.levels(sampler)
        noise = self.behind(sampler, "noise") or sampler
        chosen = self.behind(sampler, "sampler")
        own = "" if chosen is None else str(chosen.get("class_type")).removeprefix("Sampler")
        name = self.said(sampler, "sampler_name") or self.said(chosen, "sampler_name") or own
        kind = "" if sigmas is None else str(sigmas.get("class_type")).removesuffix("Scheduler").removesuffix("Sigmas")
        found.take_sampler(name, self.said(sampler, "scheduler") or self.said(sigmas, "scheduler") or kind, program="ComfyUI")
        steps = self.said(sampler, "steps") or self.said(sigmas, "steps")
        found.take("steps", steps, whole)
        found.take("seed", self.said(noise, "noise_seed", "seed"), whole)
        if self.said(noise, "variation_strength") and found.take("variation_strength", self.said(noise, "variation_strength"), number):
            found.take("variation_seed", self.said(noise, "variation_seed"), whole)
            found.note("its noise was varied by a node's own rule, here by A1111's: the picture is near, not the same")
        if self.said(sampler, "add_noise") == "disable" or str(noise.get("class_type")) == "DisableNoise":
            found.note("no noise was added before it sampled, which has no equivalent here")
        if guider is not sampler and str(guider.get("class_type")) not in _GUIDERS:
            found.note(f"the guider {guider.get('class_type')} has no equivalent here")
        self.texts(guider)
        cfg = self.said(guider, "cfg") if "cfg" in guider["inputs"] else 1.0
        if "guidance_scale" not in found.fields:  # else a node of the conditioning set what the model has built in
            found.take("guidance_scale", cfg, number, said="cfg")
        elif cfg != 1:
            found.take("true_cfg_scale", cfg, number, said="cfg")
        self.latent(sampler, self.said(sampler, "denoise") if "denoise" in sampler["inputs"] else self.said(sigmas, "denoise"), steps)
        if "neg_scale" in guider["inputs"]:
            take_node(found, str(guider.get("class_type")), partial(self.said, guider), guider["inputs"])
        self.model(guider if "model" in guider["inputs"] else sampler)
        plus_plus(found)

    def levels(self, sampler: Node) -> Node | None:
        """The node that lays the levels, with notes on those that change them afterwards and on ends of its own."""
        node = self.behind(sampler, "sigmas")
        for _ in range(64):
            if node is None or "sigmas" not in node["inputs"]:
                break
            self.found.note(f"the node {node.get('class_type')} changes the noise levels, which has no equivalent here")
            node = self.behind(node, "sigmas")
        for name, usual in _ENDS.items():
            if (said := self.said(node, name)) not in (None, usual):
                self.found.note(f"{name} {said} of the noise levels has no equivalent here")
        return node

    def texts(self, guider: Node) -> None:
        """Both texts, and what else works on them."""
        for side, prefix in (("positive", ""), ("negative", "negative_")):
            name = side if side in guider["inputs"] else "conditioning" if not prefix else ""
            start = self.behind(guider, name) if name else None
            if start is None:
                continue
            nodes = self.conditioning(start, side)
            told = [node for node in nodes if _TEXTS & {*node["inputs"]}]
            if any("ZeroOut" in str(node.get("class_type")) for node in nodes):
                continue
            if self.average(nodes, prefix):
                continue
            if told:
                self.text(told[0], prefix)
            if told[1:]:
                self.found.note(f"{len(told)} {side} texts are combined there: only the first was taken over")

    def conditioning(self, start: Node, side: str) -> list[Node]:
        """The nodes of one side's conditioning, nearest first, with notes on those that have no equivalent."""
        key = next(k for k, node in self.graph.items() if node is start)
        nodes = list(_upstream(self.graph, [key], (*_CONDITIONING[:-1], side)))
        for node in nodes:
            kind, inputs = str(node.get("class_type")), node["inputs"]
            if "guidance" in inputs:
                self.found.take("guidance_scale", self.said(node, "guidance"), number, said="guidance")
            if "control_net" in inputs:
                loader = self.behind(node, "control_net")
                name = next((base_name(v) for v in (loader or {"inputs": {}})["inputs"].values() if isinstance(v, str)), "")
                self.found.note(f"ControlNet {name!r} was used, which is not loaded here")
            elif "latent" in inputs and kind.startswith("Reference"):
                self.found.need("reference", "it looked at a picture, which the file does not hold: give it as reference")
            elif "pixels" in inputs and "mask" in inputs:
                self.found.need("image", "it was made from a picture, which the file does not hold: give it as image")
                self.found.need("mask", "it was made with a mask, which the file does not hold: give it as mask")
            elif "pixels" in inputs:
                self.found.need("reference", "it looked at a picture, which the file does not hold: give it as reference")
            elif not (_TEXTS & {*inputs} or "guidance" in inputs or "conditioning_to_strength" in inputs or kind in _CONDITIONERS):
                self.found.note(f"the node {kind} has no equivalent here")
        return nodes

    def average(self, nodes: list[Node], prefix: str) -> bool:
        """A mean of two texts as a blend; False, with a note where there is a mean, if it is not of two plain ones."""
        means = [node for node in nodes if "conditioning_to_strength" in node["inputs"]]
        ends = [self.behind(means[0], name) for name in ("conditioning_from", "conditioning_to")] if means else []
        texts = [self.said(end, "text") for end in ends]
        if prefix or len(means) != 1 or not all(isinstance(text, str) for text in texts):
            for node in means:
                self.found.note(f"the node {node.get('class_type')} has no equivalent here")
            return False
        self.found.take_prompts(texts[0])
        if self.found.take("blend", self.said(means[0], "conditioning_to_strength"), number) and self.found.take("blend_prompt", texts[1]):
            self.found.note("its texts were mixed along the straight line, here they are along the sphere: the picture is near, not the same")
        return True

    def text(self, node: Node, prefix: str) -> None:
        """The text of a node, or those of a node with one for each encoder."""
        said = [self.said(node, *names) for names in (("text", "clip_l", "text_l", "prompt", "string"), ("text_g", "clip_g"), ("t5xxl",))]
        texts = [text for text in said if isinstance(text, str)]
        if not texts:
            self.found.note(f"the text of {node.get('class_type')} is made by other nodes and was not found")
            return
        self.found.take_prompts(*((texts[0],) if not prefix else (None, texts[0])))
        for nth, text in enumerate(texts[1:], 2):
            if text and text != texts[0]:
                self.found.take(f"{prefix}prompt_{nth}", text)
        pairs = (("original_size", "height", "width"), ("crop_top_left", "crop_h", "crop_w"), ("target_size", "target_height", "target_width"))
        for name, first, second in pairs:
            if "crop_w" in node["inputs"]:
                self.found.take(f"{prefix}{name}", [self.said(node, first), self.said(node, second)])

    def latent(self, sampler: Node, denoise: Any, steps: Any) -> None:
        """Size, and the picture that it started from."""
        found = self.found
        nodes = list(_upstream(self.graph, list(_links(sampler, _LATENT)), (*_LATENT, "pixels", "image", "mask")))
        for node in nodes:
            kind = str(node.get("class_type"))
            if {"samples", "latent"} & {*node["inputs"]} and not kind.startswith(_LATENTS) and not _is_sampler(node):
                found.note(f"the node {kind} changes the latents, which has no equivalent here")
        start = self.said(sampler, "start_at_step")
        if isinstance(start, int) and isinstance(steps, int) and 0 < start < steps:
            denoise = 1 - start / steps
        end = self.said(sampler, "end_at_step")
        if isinstance(end, int) and isinstance(steps, int) and end < steps:
            found.note(f"it stops after step {end} of {steps} and leaves the rest to another pass, which was not taken over")
        pixels = [node for node in nodes if "pixels" in node["inputs"]]
        if pixels or any("image" in node["inputs"] and "Load" in str(node.get("class_type")) for node in nodes):
            names = [base_name(value) for node in nodes if isinstance(value := node["inputs"].get("image"), str)]
            found.need("image", f"it was made from {f'the picture {names[0]!r}' if names else 'a picture'}: give it as image")
            if any("mask" in node["inputs"] for node in nodes):
                found.need("mask", "it was made with a mask, which the file does not hold: give it as mask")
            found.take("strength", denoise, number, said="denoise")
            return
        if denoise not in (None, 1):
            found.note(f"denoise {denoise} on an empty picture has no equivalent here")
        empty = next((node for node in nodes if {"width", "height"} <= {*node["inputs"]}), None)
        if empty is not None:
            found.take("width", self.said(empty, "width"), whole)
            found.take("height", self.said(empty, "height"), whole)
            if self.said(empty, "batch_size") not in (None, 1):
                found.note("it is one of a batch, whose noise ComfyUI draws at once: only the first picture of it has this seed's noise")

    def larger(self, first: Node, second: Node) -> bool:
        """A second sampler that goes on from what the first made, enlarged; False where it is not that."""
        between = [node for node in _upstream(self.graph, list(_links(second, _LATENT)), (*_LATENT, "pixels", "image")) if node is not first]
        how = [node for node in between if "upscale_method" in node["inputs"]]
        denoise, steps = (self.said(second, name) for name in ("denoise", "steps"))
        if len(how) != 1 or any("upscale_model" in node["inputs"] for node in between) or not isinstance(denoise, (int, float)):
            return False
        sides = ([self.found.fields.get(name) for name in ("width", "height")], [self.said(how[0], name) for name in ("width", "height")])
        factor = self.said(how[0], "scale_by") or same_factor(*sides)
        if factor is None or not self.found.take("upscale", factor, number, said="scale_by"):
            return False
        take_upscaler(self.found, self.said(how[0], "upscale_method"), of="latents" if "samples" in how[0]["inputs"] else "pixels")
        self.found.take("upscale_strength", denoise, number, said="denoise of the second pass")
        self.found.take("upscale_steps", steps, whole, said="steps of the second pass")
        other = [name for name in ("cfg", "sampler_name", "scheduler") if self.said(second, name) != self.said(first, name)]
        self.found.note("the second pass draws its noise from a seed of its own, here from that of the first" + "".join(
            f"; it has {name} {self.said(second, name)}, here that of the first" for name in other))
        return True

    def model(self, node: Node) -> None:
        """What the network is called, and what was put on it."""
        found = self.found
        for one in _upstream(self.graph, list(_links(node, ("model", *_CONDITIONING))), ("model", "clip", *_CONDITIONING)):
            inputs = one["inputs"]
            if "lora_name" in inputs:
                name, strength = base_name(self.said(one, "lora_name")), self.said(one, "strength_model")
                found.note(f"LoRA {name!r} at {strength} was used, which is not loaded here")
            elif "stop_at_clip_layer" in inputs:
                layer = self.said(one, "stop_at_clip_layer")
                found.take("clip_skip", -layer if isinstance(layer, int) else None, whole)
            elif "shift" in inputs and str(one.get("class_type")).startswith("ModelSampling"):
                found.take("shift", self.said(one, "shift"), number)
            elif str(one.get("class_type")) == "RescaleCFG":
                found.take("guidance_rescale", self.said(one, "multiplier"), number)
            elif known_node(str(one.get("class_type"))):
                take_node(found, str(one.get("class_type")), partial(self.said, one), inputs)
            elif str(one.get("class_type")) == "TomePatchModel":
                found.take("approximate", self.said(one, "ratio"), merging)
            elif not found.model and (name := self.said(one, "ckpt_name", "unet_name", "model_name")):
                found.model = base_name(name)
                if str(held := self.said(one, "weight_dtype")).startswith("fp8"):
                    found.note(f"weight_dtype {str(held)!r:.40} held the weights in 8 bits: load the model with quantise='fp8' for the like")
            elif "model" in inputs and one.get("class_type") != "Reroute":
                found.note(f"the node {one.get('class_type')} changes the model, which has no equivalent here")
