from .elsa import ELSA
from .fit import FitResult, fit_collaborative, fit_sequential
from .multvae import MultVAE
from .sasrec import SASRec

__all__ = ["ELSA", "FitResult", "MultVAE", "SASRec", "fit_collaborative", "fit_sequential"]
