"""Maps of the patches that speak for one class.

    relevance(model, images)             # (B, gh, gw), for the predicted class of each image
    grad_cam(model, images, 11, target=3)  # Grad-CAM on the patches at the input of block 11, for class 3

With gradients of the class's logit, so unlike attention they differ between the classes of one image.
"""

import torch
from torch import Tensor

from inspection.attention import enter, updated, watch_calls
from tokens.layout import check_block
from utils import BadInput


def relevance(model, images: Tensor, target=None) -> Tensor:
    """(B, 3, h, w) -> (B, gh, gw): gradient x attention of Chefer et al. (arXiv 2103.15679) for `target`.

    In each block, R <- R + mean over heads of relu(dy/dA * A) R, with A its attention and y the logit. R is the
    identity in the first block, and a row for a token that enters later has nothing of the patches. The map is the row
    of the token that is classified: of CLS, or the mean over all tokens that the head reads (patches; CLS and
    distillation token), or over the queries of an attention pooling.

    Args:
        model: a DynamicViT or a ForeignViT (without `cls_only`).
        target: a class, or (B,) of them; None: the predicted one.

    Raises ValueError without a head, and for a class that it does not have.
    """
    attention, last = {}, []

    def see(i, call):
        attention[i] = call.weights().requires_grad_()  # also where it does not depend on the image
        return call.mixed(attention[i])

    def output(i, x):
        if i < model.depth:
            last[:] = [x]

    with torch.enable_grad():
        logits = watch_calls(model, images.detach().requires_grad_(), see, output=output)
        chosen = _chosen(model, logits, target)
        *grads, of_last = torch.autograd.grad(chosen.sum(), [*attention.values(), *last])
    shares = before = None  # the columns of R that belong to patches: the others are not needed for them
    for (i, attn), grad in zip(attention.items(), grads):
        layout, flow = model.token_layout(i), (grad * attn.detach()).clamp_min(0).mean(dim=1)  # (B, M, N)
        if layout.pool is not None:
            return (flow @ shares[:, -layout.length :]).mean(dim=1).unflatten(-1, model.grid_size)
        shares = enter(shares, before, layout, flow)
        shares, before = updated(shares, flow), layout
    read = (of_last != 0).any(dim=-1, keepdim=True).to(shares)  # (B, N, 1): what the head does not read has no gradient
    return ((read * shares).sum(dim=1) / read.sum(dim=1).clamp_min(1)).unflatten(-1, model.grid_size)


def grad_cam(model, images: Tensor, block: int, target=None) -> Tensor:
    """(B, 3, h, w) -> (B, gh, gw): Grad-CAM (Selvaraju et al., arXiv 1610.02391) on the patches x_p at a block's input.

    relu(sum over channels d of a_d x_pd), with a_d the mean over patches of dy/dx_pd. At the input of the last block,
    since after it a model that classifies CLS has no gradient on patches. Args and errors as of `relevance`.
    """
    block, inputs = check_block(block, len(model.blocks)), []

    def tokens(i, x):
        if i == block:
            inputs.append(x)

    with torch.enable_grad():
        logits = watch_calls(model, images.detach().requires_grad_(), tokens=tokens)
        (grad,) = torch.autograd.grad(_chosen(model, logits, target).sum(), inputs)
    part = model.token_layout(block).patches
    x, weights = inputs[0].detach()[:, part], grad[:, part].mean(dim=1, keepdim=True)
    return (x * weights).sum(dim=-1).clamp_min(0).unflatten(-1, model.grid_size)


def _chosen(model, logits, target) -> Tensor:
    """(B, 1): the logit of the target."""
    if not model.num_classes:
        raise ValueError("this model has no head, so it has no classes to make maps for")
    target = logits.argmax(dim=1) if target is None else torch.as_tensor(target, device=logits.device)
    if not ((target >= 0) & (target < logits.shape[1])).all():
        raise ValueError(f"there is no class {target.tolist()}: the model's classes are 0..{logits.shape[1] - 1}")
    return logits.gather(1, target.expand(len(logits))[:, None])


def class_number(text: str, classes, count: int) -> int:
    """'dog' or '5' -> 5, of `count` classes of which `classes` names some. Raises BadInput for anything else."""
    if text in classes:
        return list(classes).index(text)
    if not text.isdecimal() or int(text) >= count:
        known = f" or a name, as in {classes[0]}" if classes else ""
        raise BadInput(f"--target: this model has no class {text}; give a number, 0..{count - 1}{known}")
    return int(text)
