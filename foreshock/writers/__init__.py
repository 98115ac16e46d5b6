"""Writers: readings and alarms of an attached watch in other people's tools.

    foreshock.attach(model, optimizer, writers=[TensorBoard("tb"), WeightsAndBiases("my-project"), MLflow("my-runs")])

A package is imported when its writer is made: ``pip install 'foreshock[tensorboard]'``, ``[wandb]`` or ``[mlflow]``.
"""

from foreshock.writers.base import Writer
from foreshock.writers.jsonl import JsonLines
from foreshock.writers.mlflow import MLflow
from foreshock.writers.tensorboard import TensorBoard
from foreshock.writers.weights_and_biases import WeightsAndBiases

__all__ = ["JsonLines", "MLflow", "TensorBoard", "WeightsAndBiases", "Writer"]
