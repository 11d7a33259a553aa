from torch import nn

from cfe_lightning.files.trust import public_path
from cfe_lightning.methods.dxai import Dxai


def test_a_class_has_the_path_of_the_outermost_package_that_exports_it() -> None:
    assert public_path(Dxai) == "cfe_lightning.methods.dxai.Dxai"


def test_a_class_that_no_module_exports_has_the_path_of_its_module() -> None:
    class Local(nn.Module):
        pass

    assert public_path(Local) == f"{__name__}.{Local.__qualname__}"
