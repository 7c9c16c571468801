"""Operations on token groups: model to model."""
