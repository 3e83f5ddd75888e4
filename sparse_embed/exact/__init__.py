"""Optimizers that give a table the numbers of dense optax at the cost of the rows touched.

In: the arguments of the optax optimizer; then trees of gradients, state and parameters.
Out: a transformation whose rows may be behind, and `settle`, which brings rows up to date.
Never: a step over the whole table, nor an approximation of dense optax beyond rounding.
"""

from sparse_embed.exact._adam import adam as adam
from sparse_embed.exact._adam import adamw as adamw
from sparse_embed.exact._adam import amsgrad as amsgrad
from sparse_embed.exact._adamax import adabelief as adabelief
from sparse_embed.exact._adamax import adamax as adamax
from sparse_embed.exact._adamax import adamaxw as adamaxw
from sparse_embed.exact._adamax import yogi as yogi
from sparse_embed.exact._nadam import nadam as nadam
from sparse_embed.exact._nadam import nadamw as nadamw
from sparse_embed.exact._replay import replay as replay
from sparse_embed.exact._rmsprop import adadelta as adadelta
from sparse_embed.exact._rmsprop import rmsprop as rmsprop
from sparse_embed.exact._sgd import adagrad as adagrad
from sparse_embed.exact._sgd import ema as ema
from sparse_embed.exact._sgd import lion as lion
from sparse_embed.exact._sgd import sgd as sgd
from sparse_embed.exact._state import ExactState as ExactState
from sparse_embed.exact._state import RowClock as RowClock
from sparse_embed.exact._transform import ExactTransformation as ExactTransformation
