"""What a model attends to, and how surprised it is, in linear memory: collectors, the scan that feeds them, results.

from longlens.lens import Entropy, Received, TopKeys, rollout
with longlens.watch(model, collect=[Entropy(), Received(), TopKeys(8)]) as seen: ...
with longlens.record(model) as calls: ...

Across layers: `rollout` and `relevance` of recorded calls. By the size of what is moved: `NormWeighted`.
On the side of the vocabulary: `predictions` (surprise, entropy, rank, likeliest tokens); `longlens.trajectories` has
them by layer.
"""

from __future__ import annotations

from longlens.lens.across import CallRecorder as CallRecorder
from longlens.lens.across import relevance as relevance
from longlens.lens.across import relevance_map as relevance_map
from longlens.lens.across import rollout as rollout
from longlens.lens.across import rollout_map as rollout_map
from longlens.lens.collect.columns import ColumnEntropy as ColumnEntropy
from longlens.lens.collect.columns import Received as Received
from longlens.lens.collect.columns import ReceivedMax as ReceivedMax
from longlens.lens.collect.columns import ReceivedMean as ReceivedMean
from longlens.lens.collect.columns import TopQueries as TopQueries
from longlens.lens.collect.maps import Cells as Cells
from longlens.lens.collect.maps import DistanceHistogram as DistanceHistogram
from longlens.lens.collect.maps import Pooled as Pooled
from longlens.lens.collect.maps import WeightHistogram as WeightHistogram
from longlens.lens.collect.norms import JointNorm as JointNorm
from longlens.lens.collect.norms import NormWeighted as NormWeighted
from longlens.lens.collect.norms import value_norms as value_norms
from longlens.lens.collect.rows import Distance as Distance
from longlens.lens.collect.rows import DistanceSpread as DistanceSpread
from longlens.lens.collect.rows import EffectiveKeys as EffectiveKeys
from longlens.lens.collect.rows import Entropy as Entropy
from longlens.lens.collect.rows import Largest as Largest
from longlens.lens.collect.rows import LogSumExp as LogSumExp
from longlens.lens.collect.rows import Mass as Mass
from longlens.lens.collect.rows import TopKeys as TopKeys
from longlens.lens.predict.logit_lens import Trajectories as Trajectories
from longlens.lens.predict.vocabulary import Head as Head
from longlens.lens.predict.vocabulary import Predictions as Predictions
from longlens.lens.predict.vocabulary import predictions as predictions
