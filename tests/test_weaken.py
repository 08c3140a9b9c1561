"""Weaker views of networks against diffusers' own processors and hooks, on copies; the shared network stays as it is."""

import copy
import threading

import pytest
import torch
from tiny_folders import tiny

import latentgen
from latentgen.errors import ModelError, RequestError
from latentgen.models.weaken import broad, chosen, weakened

KINDS = {"sd15": "unet", "sdxl": "unet", "sd3": "transformer", "flux1": "transformer", "flux2": "transformer", "zimage": "transformer",
         "qwenimage": "transformer", "pixart": "transformer"}
DICE = torch.Generator().manual_seed(0)


def noise(*shape):
    return torch.randn(shape, generator=DICE)


def call(kind, net, batch=1):
    """The network asked about the same things every time."""
    DICE.manual_seed(1)
    x = {"sd15": (4, 8, 8), "sdxl": (4, 8, 8), "sd3": (16, 8, 8), "pixart": (4, 8, 8), "zimage": (16, 1, 8, 8)}.get(kind)
    x = None if x is None else noise(1, *x).repeat(batch, *[1] * len(x))

    def words(*shape):
        return noise(1, *shape).repeat(batch, *[1] * len(shape))

    with torch.no_grad():
        if kind == "sd15":
            return net(x, 500, words(7, 32), return_dict=False)[0]
        if kind == "sdxl":
            added = {"text_embeds": words(32), "time_ids": words(6)}
            return net(x, 500, words(7, 64), added_cond_kwargs=added, return_dict=False)[0]
        if kind == "sd3":
            return net(x, words(7, 64), words(64), torch.tensor([500.0]), return_dict=False)[0]
        if kind == "pixart":
            return net(x, words(7, 32), torch.tensor([500.0]), added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False)[0]
        if kind == "zimage":
            return net(list(x), torch.tensor([0.5]), list(words(7, 16)), return_dict=False)[0][0]
        width, places = {"flux1": (32, 3), "flux2": (48, 4), "qwenimage": (16, 3)}[kind]
        tokens, time = noise(1, 16, net.config.in_channels), torch.tensor([0.5])
        if kind == "qwenimage":
            return net(tokens, words(7, width), timestep=time, img_shapes=[[(1, 4, 4)]], return_dict=False)[0]
        where = torch.zeros(16, places)
        where[:, 1], where[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
        pooled = {"pooled_projections": words(32), "guidance": torch.tensor([3.5])} if kind == "flux1" else {}
        return net(tokens, words(7, width), timestep=time, img_ids=where, txt_ids=torch.zeros(7, places), return_dict=False, **pooled)[0]


def network(kind):
    return tiny(kind).modules[KINDS[kind]]


def weak(kind, guider, layers):
    return weakened({KINDS[kind]: network(kind), "other": torch.nn.Identity()}, guider=guider, layers=layers)[KINDS[kind]]


class ValuesAlone:
    """Joint attention with the identity for a map, written out."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        picture = attn.to_out[0](attn.to_v(hidden_states))
        return picture if encoder_hidden_states is None else (picture, attn.to_add_out(attn.add_v_proj(encoder_hidden_states)))


@pytest.mark.parametrize("layers", [["mid_block"], ["up_blocks", "mid_block"]])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_pag_of_a_u_net_is_that_of_diffusers_processors(kind, layers):
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    theirs = copy.deepcopy(network(kind))
    for name, module in theirs.named_modules():
        if name.endswith("attn1") and name.split(".")[0] in layers:
            module.processor = PAGIdentitySelfAttnProcessor2_0()
    wanted = call(kind, theirs, batch=2)[1:]  # plain pictures first, then perturbed ones
    made = call(kind, weak(kind, "pag", layers))
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    assert (made - call(kind, network(kind))).abs().max() > 1e-3


@pytest.mark.parametrize("kind, stack", [("sd3", "transformer_blocks"), ("zimage", "layers"), ("qwenimage", "transformer_blocks"), ("pixart", "transformer_blocks")])
@pytest.mark.parametrize("guider", ["pag", "slg"])
def test_transformers_are_weakened_as_by_diffusers_hooks(guider, kind, stack):
    """PAG against its hook, or where that knows no joint attention by hand; a left-out block (whose hook mixes words and picture up) by leaving it out."""
    from diffusers.hooks.layer_skip import LayerSkipConfig, apply_layer_skip

    theirs = copy.deepcopy(network(kind))
    blocks = getattr(theirs, stack)
    if guider == "slg":
        setattr(theirs, stack, blocks[1:])
    elif kind == "sd3":
        blocks[0].attn.processor = blocks[0].attn2.processor = ValuesAlone()
    else:
        apply_layer_skip(theirs, LayerSkipConfig([0], fqn=stack, skip_attention=False, skip_attention_scores=True, skip_ff=False))
    made = call(kind, weak(kind, guider, [f"{stack}.0"]))
    torch.testing.assert_close(made, call(kind, theirs), rtol=1e-4, atol=1e-5)
    assert (made - call(kind, network(kind))).abs().max() > 1e-3


@pytest.mark.parametrize("layers", [["transformer_blocks"], ["single_transformer_blocks"], ["transformer_blocks.0", "single_transformer_blocks.0"]])
@pytest.mark.parametrize("kind", ["flux1", "flux2"])
def test_blocks_of_two_stacks_are_left_out(kind, layers):
    """Against the same network built without them; its attention weakened differs from both."""
    theirs = copy.deepcopy(network(kind))
    for layer in layers:
        setattr(theirs, layer.split(".")[0], torch.nn.ModuleList())
    torch.testing.assert_close(call(kind, weak(kind, "slg", layers)), call(kind, theirs), rtol=1e-4, atol=1e-5)
    pag = call(kind, weak(kind, "pag", layers))
    assert min((pag - call(kind, net)).abs().max() for net in (theirs, network(kind))) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_layers_to_weaken_and_keeps_its_own(kind):
    net, before = network(kind), call(kind, network(kind))
    weights = {id(p) for p in net.parameters()}
    for guider in ("pag", "slg"):
        layers = chosen(net, guider=guider, said="middle")
        made = weak(kind, guider, layers)
        assert {id(p) for p in made.parameters()} == weights and layers == (["mid_block"] if KINDS[kind] == "unet" else layers)
        assert (call(kind, made) - before).abs().max() > 1e-4
    assert torch.equal(call(kind, net), before)


def test_threads_do_not_see_each_others_views():
    net, found = network("sd15"), {}
    alone = {"plain": call("sd15", net), "pag": call("sd15", weak("sd15", "pag", ["mid_block"]))}
    x, words = noise(1, 4, 8, 8), noise(1, 7, 32)
    with torch.no_grad():
        wanted = {"plain": net(x, 500, words).sample, "pag": weak("sd15", "pag", ["mid_block"])(x, 500, words).sample}

        def run(name):
            own = net if name == "plain" else weak("sd15", "pag", ["mid_block"])
            with torch.no_grad():
                found[name] = [torch.equal(own(x, 500, words).sample, wanted[name]) for _ in range(20)]

        threads = [threading.Thread(target=run, args=(name,)) for name in wanted]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert found == {"plain": [True] * 20, "pag": [True] * 20} and not torch.equal(*alone.values())


def test_layers_by_number_name_and_default():
    net = copy.deepcopy(network("sd3"))
    assert chosen(net, guider="pag", said=[0, "transformer_blocks.1"]) == ["transformer_blocks.0", "transformer_blocks.1"]
    assert chosen(net, guider="pag", said="1") == ["transformer_blocks.1"] and chosen(net, guider="slg", said="middle") == ["transformer_blocks.1"]
    net.transformer_blocks.extend([copy.deepcopy(net.transformer_blocks[0]) for _ in range(22)])
    assert chosen(net, guider="slg", said="middle") == [f"transformer_blocks.{n}" for n in (7, 8, 9)]  # as Stable Diffusion 3.5 medium is run
    assert chosen(net, guider="pag", said="middle") == ["transformer_blocks.12"]
    assert chosen(network("sd15"), guider="slg", said=["mid_block", "up_blocks.1"]) == ["mid_block", "up_blocks.1"]


def test_half_of_the_network_or_more_is_noted():
    net = copy.deepcopy(network("sd3"))
    net.transformer_blocks.extend([copy.deepcopy(net.transformer_blocks[0]) for _ in range(6)])
    note = "slg leaves out 4 of this network's 8 blocks: what is left knows little of the picture, so name fewer"
    assert broad(net, guider="slg", layers=[f"transformer_blocks.{n}" for n in range(4)]) == note
    assert broad(net, guider="slg", layers=[f"transformer_blocks.{n}" for n in range(3)]) == ""
    assert broad(net, guider="pag", layers=["transformer_blocks"]).startswith("pag weakens 15 of this network's 15 self-attentions")


def test_a_plan_says_so():
    pipe = latentgen.load("glyph", device="cpu", progress=False)
    noted = {layers: any("name fewer" in note for note in pipe.plan("a cat", guiders={"slg": {"layers": layers}}).notes) for layers in ("middle", "up_blocks")}
    assert noted == {"middle": False, "up_blocks": True}


@pytest.mark.parametrize("kind, said, word", [("sd15", "mid", "'mid' but there this network .* has no self-attention: choose among down_blocks.0, mid_block, up_blocks.1"),
                                              ("sd15", 3, "choose among down_blocks"), ("sd3", [0, 99], "layer is 99"), ("sd15", "down_blocks.1", "no self-att")])
def test_layers_that_are_not_there(kind, said, word):
    with pytest.raises(RequestError, match=word):
        chosen(network(kind), guider="pag", said=said)


def test_networks_that_cannot_be_weakened():
    with pytest.raises(RequestError, match=r"slg is given but this network \(Conv2d\) has no blocks"):
        chosen(torch.nn.Conv2d(1, 1, 1), guider="slg", said="middle")

    class OwnKernel:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    net = copy.deepcopy(network("sd15"))
    net.mid_block.attentions[0].transformer_blocks[0].attn1.processor = OwnKernel()
    made = weakened({"unet": net}, guider="pag", layers=["mid_block"])["unet"]
    with pytest.raises(ModelError, match="pag cannot weaken it"):
        call("sd15", made)
