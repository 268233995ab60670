"""What a model attends to, and how surprised it is, in linear memory: collectors, the scan that feeds them, results.

from longlens.lens import Entropy, Received, TopKeys
with longlens.watch(model, collect=[Entropy(), Received(), TopKeys(8)]) as seen: ...

Across layers: `rollout` and `relevance` of what a `Recorder` kept. By the size of what is moved: `NormWeighted`.
On the side of the vocabulary: `predictions` (surprise, entropy, rank, likeliest tokens) and `trajectories` (by layer).
"""

from __future__ import annotations

from longlens.lens.across_layers import Recorder as Recorder
from longlens.lens.across_layers import relevance as relevance
from longlens.lens.across_layers import relevance_map as relevance_map
from longlens.lens.across_layers import rollout as rollout
from longlens.lens.across_layers import rollout_map as rollout_map
from longlens.lens.columns import ColumnEntropy as ColumnEntropy
from longlens.lens.columns import Received as Received
from longlens.lens.columns import ReceivedMax as ReceivedMax
from longlens.lens.columns import ReceivedMean as ReceivedMean
from longlens.lens.columns import TopQueries as TopQueries
from longlens.lens.logit_lens import Trajectories as Trajectories
from longlens.lens.logit_lens import trajectories as trajectories
from longlens.lens.maps import Cells as Cells
from longlens.lens.maps import DistanceHistogram as DistanceHistogram
from longlens.lens.maps import Pooled as Pooled
from longlens.lens.maps import WeightHistogram as WeightHistogram
from longlens.lens.norms import JointNorm as JointNorm
from longlens.lens.norms import NormWeighted as NormWeighted
from longlens.lens.norms import value_norms as value_norms
from longlens.lens.rows import Distance as Distance
from longlens.lens.rows import DistanceSpread as DistanceSpread
from longlens.lens.rows import EffectiveKeys as EffectiveKeys
from longlens.lens.rows import Entropy as Entropy
from longlens.lens.rows import Largest as Largest
from longlens.lens.rows import LogSumExp as LogSumExp
from longlens.lens.rows import Mass as Mass
from longlens.lens.rows import TopKeys as TopKeys
from longlens.lens.vocabulary import Head as Head
from longlens.lens.vocabulary import Predictions as Predictions
from longlens.lens.vocabulary import predictions as predictions
