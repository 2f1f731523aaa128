"""16  LoRA: adapt a large matrix by training two thin ones.

中文：实现 LoRA：冻结原矩阵，在旁边训练低秩的 B·A，开始时输出与原模型完全相同。

Fine-tuning all weights needs gradients and Adam's two means for each. The change that fine-tuning makes to a matrix is nearly of low rank,
so write it as a product B A of two thin matrices and train only those: for 4096 x 4096 and r = 8 that is 65,536 numbers instead of 16.8
million. A starts random and B at zero: then the product is zero and the first step starts from exactly the base model, while B already gets a
gradient. (With both at zero no gradient would ever arrive.)

    y = W x + bias + (alpha / r) * B (A x)            A (r, in) random,  B (out, r) zero,  W and bias frozen

Hu et al. 2021, section 4.1 (arXiv:2106.09685). The solution: `LoRALinear` in nanollm/peft/lora.py. Judge:  python -m learn.exercises 16
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """An nn.Linear with a trainable update of rank r beside it. Its parameters to train are called lora_A (r, in) and lora_B (out, r)."""

    def __init__(self, base, r, alpha):
        """base: nn.Linear. r: the rank. alpha: the update is multiplied by alpha / r."""
        super().__init__()
        # Hint 1: keep base as self.base and freeze it: base.requires_grad_(False).
        # Hint 2: nn.Parameter(torch.empty(r, base.in_features)) with nn.init.kaiming_uniform_(…, a=5**0.5); nn.Parameter(torch.zeros(…)).
        raise NotImplementedError("write LoRALinear.__init__")

    def forward(self, x):
        """x (…, in) -> (…, out)."""
        # Hint 3: F.linear(x, A) is A x for each row; never multiply B A out, that would be the large matrix again.
        raise NotImplementedError("write LoRALinear.forward")
