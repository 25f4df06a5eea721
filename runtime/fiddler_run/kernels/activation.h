// Included by cpu.cpp: the activation of an expert's neurons; plan/activation.py has its formula.

enum Function : int { SILU, GELU_TANH, RELU2 };  // as FUNCTIONS in cpu.py

struct Activation {
    Function function;
    float alpha, offset, limit;  // limit: infinite if there is none

    // For experts without a gate, `gate` is up.
    float operator()(float gate, float up) const {
        if (function == RELU2) return std::max(gate, 0.0f) * up;
        gate = std::min(gate, limit), up = std::clamp(up, -limit, limit);  // NaN stays NaN
        // (1 + tanh(x)) / 2 is sigmoid(2 * x).
        constexpr float SCALE = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
        float x = function == SILU ? alpha * gate
                                   : SCALE * (gate + 0.044715f * gate * gate * gate);
        return gate / (1.0f + std::exp(-x)) * (up + offset);
    }

    // Calls f(a function of gate and up). Without constants, silu is a fifth faster.
    template <class F>
    void select(F&& f) const {
        constexpr float INFINITE = std::numeric_limits<float>::infinity();
        if (function == SILU && alpha == 1 && offset == 0 && limit == INFINITE)
            f([](float gate, float up) { return gate / (1.0f + std::exp(-gate)) * up; });
        else f(*this);
    }
};
