"""Numerics: functions on tensors, each with a plain reference that tests compare it with.

The axis letters of the whole project; a tensor whose shape is not obvious carries them as a suffix, as in `state_BHKV`:

    B  batch                 D  model dim
    T  time                  E  experts
    H  heads                 C  chunk length
    K  key (and query) dim   N  number of chunks, documents, tokens or rows
    V  value dim, vocabulary O  output dim of a linear layer
"""
