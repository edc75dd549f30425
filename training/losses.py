"""The loss that learns from a teacher."""

import torch.nn.functional as F
from torch import Tensor, nn


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
        if kind not in ("soft", "hard"):
            raise ValueError(f"kind must be soft or hard, not {kind!r}")
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
