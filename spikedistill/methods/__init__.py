"""Published methods, one file a paper. The last function of a file is named after the method and gives its Plan."""

from collections.abc import Callable
from inspect import isfunction

from spikedistill import own
from spikedistill.core.plan import Plan
from spikedistill.methods.activity import activity  # 2024 Louis et al., ICANN, arXiv:2406.18350
from spikedistill.methods.bkd import bkd  # 2024 Xu et al., ECCV, arXiv:2407.09083
from spikedistill.methods.ce import ce  # direct training
from spikedistill.methods.ckd import ckd  # 2025 Ye et al., ICME, arXiv:2507.09269
from spikedistill.methods.ckdsnn import ckdsnn  # 2026 Liu et al., AAAI, arXiv:2511.06902
from spikedistill.methods.distilling_spikes import distilling_spikes  # 2020 Kushawaha et al., ICPR, arXiv:2005.00288
from spikedistill.methods.energy_efficient_kd import (
    energy_efficient_kd,  # 2021 Lee et al., arXiv:2106.07172, in the style of
)
from spikedistill.methods.full_range_kd import full_range_kd  # 2025 Yu et al., ICML, arXiv:2501.15925
from spikedistill.methods.hsd import hsd  # 2024 Zhong et al., ACM MM, arXiv:2409.12507
from spikedistill.methods.hta_kl import hta_kl  # 2025 Zhang et al., arXiv:2504.20445, in the style of, experimental
from spikedistill.methods.joint_a_snn import joint_a_snn  # 2023 Guo et al., Pattern Recognition, arXiv:2305.02099
from spikedistill.methods.kd import kd  # 2015 Hinton et al., arXiv:1503.02531
from spikedistill.methods.kd_snn_liang import kd_snn_liang  # 2024 Liang et al., IJCNN, in the style of
from spikedistill.methods.kdsnn import kdsnn  # 2023 Xu et al., CVPR, arXiv:2304.05627
from spikedistill.methods.lasnn import lasnn  # 2023 Hong et al., arXiv:2304.09101
from spikedistill.methods.meom import meom  # 2026 Sun et al., ICLR, in the style of
from spikedistill.methods.sakd import sakd  # 2024 Qiu et al., Neural Networks, openreview:QwFw-CcUb10
from spikedistill.methods.seal_kd import seal_kd  # 2026 Sun et al., arXiv:2605.14252
from spikedistill.methods.static2dvs import static2dvs  # 2024 He et al., AAAI, arXiv:2303.13077
from spikedistill.methods.strong2weak import strong2weak  # 2025 Ding et al., NeurIPS, arXiv:2510.07924
from spikedistill.methods.tet import tet  # 2022 Deng et al., ICLR, arXiv:2202.11946
from spikedistill.methods.tks import tks  # 2024 Dong et al., IEEE TAI, arXiv:2304.06540
from spikedistill.methods.tser import tser  # 2025 Yu et al., CVPR, arXiv:2503.03144
from spikedistill.methods.tssd import tssd  # 2024 Zuo et al., arXiv:2406.07862

METHODS = {name: function for name, function in sorted(globals().items()) if isfunction(function)}
del METHODS["isfunction"]


def builder(name: str) -> Callable[..., Plan]:
    """The function of a method's name, one of METHODS or 'path/to/file.py:function', one of yours like them."""
    return METHODS[name] if name in METHODS else own.imported(name)


__all__ = ["METHODS", "builder", *METHODS]
