package token

import "time"

// Metrics emits what has been verified and how old the keys are, for one scrape. It does not wait for the network.
func (v *Verifier) Metrics(emit func(name, help string, counter bool, value float64, labels ...string)) {
	for verdict := range verdicts {
		if verdict != slow {
			emit("millrace_token_verified_total", "Tokens looked at, by outcome.", true,
				float64(v.counts[verdict].Load()), "outcome", verdictTexts[verdict].label)
		}
	}
	set := v.set.Load()
	for a, keys := range set.keys {
		emit("millrace_token_keys", "Verification keys in use.", false, float64(len(keys)), "algorithm", algorithmNames[a])
	}
	kept := 0
	if set.cache != nil {
		kept = set.cache.len()
	}
	emit("millrace_token_cache_tokens", "Verified tokens that are remembered.", false, float64(kept))
	emit("millrace_token_cache_hits_total", "Tokens that were remembered and not verified again.", true, float64(v.hits.Load()))
	for _, s := range v.sources {
		if s.read == nil {
			continue
		}
		emit("millrace_token_refresh_failures_total", "Failures to load verification keys.", true, float64(s.failed.Load()), "source", s.name)
		if at := s.loadedAt.Load(); at != 0 {
			emit("millrace_token_keys_age_seconds", "Seconds since verification keys were last loaded.", false,
				max(0, time.Since(time.Unix(at, 0)).Seconds()), "source", s.name)
		}
	}
}
