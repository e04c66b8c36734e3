"""The networks of the papers, as plain `nn.Sequential` models on pixels in [0, 1].

"4C3F" and "6C2F" each name two different nets in the literature; the suffix says whose strides and
paddings are meant. Parameter counts in the docstrings are for an activation without parameters.
"""

from collections.abc import Callable

from torch import nn

from lipcert.errors import LipcertError
from lipcert.layers import MaxMin
from lipcert.models.building import Convolution, convolutional


def lmt_mnist(
    in_shape: tuple[int, int, int] = (1, 28, 28),
    classes: int = 10,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """The MNIST net of LMT: two strided convolutions and two dense layers.

    conv 16 (4x4, stride 2, padding 1), conv 32 (4x4, stride 2, padding 1), dense 100, dense
    ``classes``, with the activation after every layer but the last. 166 406 parameters for
    (1, 28, 28) and 10 classes.

    Args:
        in_shape: (channels, height, width) of one input.
        classes: Number of logits.
        activation: Called without arguments for every activation layer.

    Raises:
        LipcertError: the input is too small, or the activation does not fit a layer.

    Reference: arXiv 1802.04034, experiments on MNIST.
    """
    return convolutional(in_shape, classes, activation, [(16, 4, 2, 1), (32, 4, 2, 1)], [100])


def c4f3_bcp(
    in_shape: tuple[int, int, int],
    classes: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """The 4C3F net of BCP and Local-Lip.

    conv 32 (3x3, stride 1, padding 1), conv 32 (4x4, 2, 1), conv 64 (3x3, 1, 1), conv 64
    (4x4, 2, 1), dense 512, dense 512, dense ``classes``, with the activation after every layer but
    the last. 1 974 762 parameters for (1, 28, 28) and 2 466 858 for (3, 32, 32), 10 classes.

    Args:
        in_shape: (channels, height, width) of one input.
        classes: Number of logits.
        activation: Called without arguments for every activation layer.

    Raises:
        LipcertError: the input is too small, or the activation does not fit a layer.

    Reference: arXiv 2111.01395, experiments on MNIST.
    """
    convolutions = [(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)]
    return convolutional(in_shape, classes, activation, convolutions, [512, 512])


def c4f3_cll(
    in_shape: tuple[int, int, int],
    classes: int,
    activation: Callable[[], nn.Module] = MaxMin,
) -> nn.Sequential:
    """The 4C3F net of CLL, whose strided convolutions have 3x3 kernels.

    conv 32 (3x3, stride 1, padding 1), conv 32 (3x3, 2, 1), conv 64 (3x3, 1, 1), conv 64
    (3x3, 2, 1), dense 512, dense 512, dense ``classes``, with the activation after every layer but
    the last. 2 431 018 parameters for (3, 32, 32) and 10 classes.

    Args:
        in_shape: (channels, height, width) of one input.
        classes: Number of logits.
        activation: Called without arguments for every activation layer.

    Raises:
        LipcertError: the input is too small, or the activation does not fit a layer.

    Reference: arXiv 2309.06166, the authors' code.
    """
    convolutions = [(32, 3, 1, 1), (32, 3, 2, 1), (64, 3, 1, 1), (64, 3, 2, 1)]
    return convolutional(in_shape, classes, activation, convolutions, [512, 512])


def c6f2_bcp(
    in_shape: tuple[int, int, int],
    classes: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """The 6C2F net of BCP, Local-Lip, GloRo and CLL (CRM means `c6f2_crm` by this name).

    conv 32 (3x3, stride 1, padding 1) twice, conv 32 (4x4, 2, 1), conv 64 (3x3, 1, 1) twice,
    conv 64 (4x4, 2, 1), dense 512, dense ``classes``, with the activation after every layer but
    the last. 2 250 378 parameters for (3, 32, 32) and 10 classes.

    Args:
        in_shape: (channels, height, width) of one input.
        classes: Number of logits.
        activation: Called without arguments for every activation layer.

    Raises:
        LipcertError: the input is too small, or the activation does not fit a layer.

    Reference: arXiv 2111.01395, experiments on CIFAR-10.
    """
    convolutions = [
        (32, 3, 1, 1),
        (32, 3, 1, 1),
        (32, 4, 2, 1),
        (64, 3, 1, 1),
        (64, 3, 1, 1),
        (64, 4, 2, 1),
    ]
    return convolutional(in_shape, classes, activation, convolutions, [512])


def c6f2_crm(
    in_shape: tuple[int, int, int],
    classes: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """The 6C2F net of CRM, a third of the size of `c6f2_bcp`: the first of `crm_depth`.

    733 866 parameters for (3, 32, 32) and 10 classes.

    Args:
        in_shape: (channels, height, width) of one input.
        classes: Number of logits.
        activation: Called without arguments for every activation layer.

    Raises:
        LipcertError: the input is too small, or the activation does not fit a layer.

    Reference: arXiv 2310.00116, experiments on CIFAR-10.
    """
    return crm_depth(in_shape, classes, activation=activation)


def crm_depth(
    in_shape: tuple[int, int, int],
    classes: int,
    convolutions: int = 6,
    dense: int = 2,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """The nets of growing depth of CRM's timing study: 6C2F, 7C2F, 8C2F, 9C2F, 9C3F ... 11C4F.

    The convolutions are the first ones of: 32 (3x3, stride 1, padding 1), 32 (4x4, 2, 1), 64
    (3x3, 1, 1), and then 64 (4x4, 2, 1) and 64 (3x3, 1, 1) in turn. Hidden dense layers: 512 up to
    7C2F, 256 for 8C2F and 9C2F, 128 and 128 for 9C3F, 128, 128 and 64 for 9C4F, 64, 64 and 32 for
    10C4F and 11C4F. The activation follows every layer but the last. For (3, 32, 32)
    and 10 classes 733 866 parameters (6C2F), 770 794 (7C2F), and 374 826 (8C2F) to 456 650 (11C4F).

    Args:
        in_shape: (channels, height, width) of one input.
        classes: Number of logits.
        convolutions: Number of convolutions.
        dense: Number of dense layers, the last included.
        activation: Called without arguments for every activation layer.

    Raises:
        LipcertError: there is no such member, the input is too small, or the activation does not
            fit a layer.

    Reference: arXiv 2310.00116, the authors' code.
    """
    if (convolutions, dense) not in _CRM_WIDTHS:
        members = ", ".join(f"{c} and {d}" for c, d in _CRM_WIDTHS)
        raise LipcertError(
            f"there is no net with {convolutions} convolutions and {dense} dense layers; there are "
            f"those with {members}"
        )
    layers = [(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), *[(64, 4, 2, 1), (64, 3, 1, 1)] * 4]
    widths = _CRM_WIDTHS[convolutions, dense]
    return convolutional(in_shape, classes, activation, layers[:convolutions], widths)


# (convolutions, dense layers) and the widths of the hidden dense layers
_CRM_WIDTHS = {
    (6, 2): [512],
    (7, 2): [512],
    (8, 2): [256],
    (9, 2): [256],
    (9, 3): [128, 128],
    (9, 4): [128, 128, 64],
    (10, 4): [64, 64, 32],
    (11, 4): [64, 64, 32],
}


def c8f2_bcp(
    in_shape: tuple[int, int, int],
    classes: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """The 8C2F net of BCP, Local-Lip, GloRo and CLL, for Tiny-ImageNet.

    conv 64 (3x3, stride 1, padding 1) twice, conv 64 (4x4, 2, 0), conv 128 (3x3, 1, 1) twice,
    conv 128 (4x4, 2, 0), conv 256 (3x3, 1, 1), conv 256 (4x4, 2, 0), dense 256, dense ``classes``,
    with the activation after every layer but the last. 4 342 984 parameters for (3, 64, 64) and
    200 classes.

    Args:
        in_shape: (channels, height, width) of one input.
        classes: Number of logits.
        activation: Called without arguments for every activation layer.

    Raises:
        LipcertError: the input is too small, or the activation does not fit a layer.

    Reference: arXiv 2111.01395, experiments on Tiny-ImageNet.
    """
    return convolutional(in_shape, classes, activation, _c8(second_padding=1), [256])


def c8f2_crm(
    in_shape: tuple[int, int, int],
    classes: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """The 8C2F net of CRM: `c8f2_bcp` without padding in its second convolution.

    4 342 984 parameters for (3, 64, 64) and 200 classes.

    Args:
        in_shape: (channels, height, width) of one input.
        classes: Number of logits.
        activation: Called without arguments for every activation layer.

    Raises:
        LipcertError: the input is too small, or the activation does not fit a layer.

    Reference: arXiv 2310.00116, experiments on Tiny-ImageNet.
    """
    return convolutional(in_shape, classes, activation, _c8(second_padding=0), [256])


def _c8(second_padding: int) -> list[Convolution]:
    wide = [(128, 3, 1, 1), (128, 3, 1, 1), (128, 4, 2, 0), (256, 3, 1, 1), (256, 4, 2, 0)]
    return [(64, 3, 1, 1), (64, 3, 1, second_padding), (64, 4, 2, 0), *wide]
