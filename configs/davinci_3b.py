"""daVinci-LLM 3B as the report describes it (arXiv 2603.27164): 8 T tokens in four stages.

The model is table 4, the pool table 2, the stages tables 2 and 5; `davinci_jax/curriculum/recipe.py` holds the last
two and says where the tables leave a choice. Put the shard sets below `data.root` (one folder per source, named as in
the pool), or give another prefix: data.root=/mnt/pool.

Appendix B found two variants better than the table, each an override:

  cosine decay in stage 2-2:        curriculum.2-2.learning_rate='{"peak":3e-5,"shape":"cosine","final":3e-6}'
  no loss on the questions of QA:   data.sources.QA.loss=answers

"""

from davinci_jax.curriculum.recipe import POOL, STAGES
from davinci_jax.experiment import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)
from davinci_jax.models import presets


def config() -> Experiment:
    return Experiment(
        run=RunConfig(name="davinci_3b", micro_batch=4),
        model=presets.davinci_3b(),
        data=DataConfig(root="data/davinci", sources=POOL, sequence_length=4096),
        curriculum=STAGES,
        optimizer=OptimizerConfig(name="adamw", beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0),
        mesh=MeshConfig(),
        evaluation=EvaluationConfig(every_steps=5000),
        checkpoint=CheckpointConfig(every_steps=5000, keep_every=5000),
    )
