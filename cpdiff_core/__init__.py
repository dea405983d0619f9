"""Conditional LoRA parameter generation (COND P-DIFF): the science, without any workflow engine.

Shape legend, used as suffixes of tensor names everywhere::

    N  harvested checkpoints of one run        K  LoRA parameters in one flattened vector
    M  generated candidates                    C  latent channels
    V  vectors of any kind (N, M, 1, ...)      L  latent length
    S  adapters stacked in one forward pass    D  width of the condition embedding
    B  batch                                   T  tokens

So ``w_NK`` is a harvest, ``z_BCL`` a batch of latents and ``y_BD`` a batch of condition embeddings.
"""

__version__ = "0.1.0"
