"""The evaluation of a whole run: trained artefacts and unseen users in, metrics.json and a report out."""
