"""Text → tokens → loss: rows become samples, samples are rendered, checkpoints are loaded.

sample                           rows become samples
rendering, templates, template_limits    a sample in a format variant: tokens and targets
checkpoints, lora, weight_keys, foreign_weights    find and hash the files of checkpoints
add_checkpoints, trainer_runs, save_objects        add them: one, a training run, a model in memory
loading, auto_models             load them
losses, batching                 batches of similar length, and their losses
sentence_encoders                texts to vectors
weight_distance                  how far two checkpoints are apart
"""
