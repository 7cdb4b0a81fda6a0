"""Stage inject: a user's taste as tokens beside the text in every cross-attention of the frozen UNet."""
