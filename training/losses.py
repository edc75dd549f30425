"""Losses: that of classes which count alike, and the one that learns from a teacher."""

import torch.nn.functional as F
from torch import Tensor, nn


class WeightedLoss(nn.Module):
    """Mean over the images of (loss x weight of its class; of mixed images, the weights by the shares of their labels).

    Unlike torch's `weight`, it divides by the number of images, not by their weights, so that an image counts the same
    in whatever batch it is, and on whatever process.

    Args:
        base: (logits (B, K), labels (B,) or (B, K)) -> losses (B,) or (B, K).
        weights: (K,).
    """

    def __init__(self, base: nn.Module, weights: Tensor):
        super().__init__()
        self.base, self.weights = base, weights

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        of_image = self.weights[labels] if labels.ndim == 1 else labels @ self.weights
        losses = self.base(logits, labels).reshape(len(logits), -1).mean(dim=1)
        return (losses * of_image).mean()


class DistillationLoss(nn.Module):
    """(1 - alpha) * loss on the labels + alpha * loss on a teacher's output (DeiT, arXiv 2012.12877, section 4).

    Where the model has a distillation token, its own head learns from the teacher, and the other one from the labels;
    else the one head learns from both.

    Args:
        base: (logits (B, K), labels) -> mean loss.
        kind: 'soft': Kullback-Leibler divergence from the teacher's distribution at temperature `tau`, per image (not
            per class), times tau squared (Hinton, 1503.02531); 'hard': cross-entropy with the teacher's decision.
    """

    def __init__(self, base: nn.Module, kind: str, alpha: float = 0.5, tau: float = 1.0):
        super().__init__()
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau

    def forward(self, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor, teacher_logits: Tensor) -> Tensor:
        logits, of_dist = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        of_dist, teacher_logits = of_dist.float(), teacher_logits.float()
        if self.kind == "hard":
            distillation = F.cross_entropy(of_dist, teacher_logits.argmax(dim=1))
        else:
            student = F.log_softmax(of_dist / self.tau, dim=1)
            teacher = F.log_softmax(teacher_logits / self.tau, dim=1)
            distillation = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.tau**2
        return (1 - self.alpha) * self.base(logits, labels) + self.alpha * distillation
