// What llama.cpp's --fit chooses for CUDA devices of any free memory, without a GPU and without CUDA.
//
// The devices are those of benchmarks/memory/dry_cuda.cpp; here each says how many bytes it has free, and common_fit_params runs as
// in llama-server. Built like dry_cuda.cpp, against llama.cpp b10488.
//
//   dry_fit < file    one fit a line: free MiB of each device, separated by commas, then llama-fit-params' flags
//
// Output: llama-fit-params' own line for each, "-c 8192 -ngl 65 -ts 36,29". Every line must name the same number of devices.

#define main measure_main
#include "../memory/dry_cuda.cpp"
#undef main

namespace {

std::vector<size_t> free_bytes;

void stated_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    for (size_t i = 0; i < devices().size(); i++) {
        if (devices()[i] == dev) { *free = *total = free_bytes[i]; }
    }
}

void fit(const std::vector<std::string> & given) {
    std::vector<std::string> words = given;
    std::vector<char *> argv;
    for (auto & word : words) { argv.push_back(word.data()); }
    common_params params;
    if (!common_params_parse((int) argv.size(), argv.data(), params, LLAMA_EXAMPLE_FIT_PARAMS)) { printf("error\n"); return; }
    auto mparams = common_model_params_to_llama(params);
    auto cparams = common_context_params_to_llama(params);
    const auto level = getenv("DRY_VERBOSE") ? GGML_LOG_LEVEL_DEBUG : GGML_LOG_LEVEL_ERROR;
    common_fit_params(params.model.path.c_str(), &mparams, &cparams, params.tensor_split, params.tensor_buft_overrides.data(),
        params.fit_params_target.data(), params.fit_params_min_ctx, level);
    printf("-c %u -ngl %d", cparams.n_ctx, mparams.n_gpu_layers);
    size_t n = devices().size();
    while (n > 1 && params.tensor_split[n - 1] == 0.0f) { n--; }
    for (size_t i = 0; n > 1 && i < n; i++) { printf("%s%u", i ? "," : " -ts ", (unsigned) params.tensor_split[i]); }
    const auto & overrides = params.tensor_buft_overrides;
    for (size_t i = 0; i < overrides.size() && overrides[i].pattern; i++) {
        printf("%s%s=%s", i ? "," : " -ot ", overrides[i].pattern, ggml_backend_buft_name(overrides[i].buft));
    }
    printf("\n");
    fflush(stdout);
}

}  // namespace

int main(int, char ** argv) {
    if (!getenv("DRY_VERBOSE")) { llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr); }
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream stream(line);
        std::string sizes, size, word;
        if (!(stream >> sizes)) { continue; }
        std::istringstream parts(sizes);
        for (free_bytes.clear(); std::getline(parts, size, ',');) { free_bytes.push_back(std::stoull(size) << 20); }
        if (devices().empty()) {
            register_devices((int) free_bytes.size());
            for (auto * dev : devices()) { dev->iface.get_memory = stated_memory; }
        }
        std::vector<std::string> words = { argv[0] };
        while (stream >> word) { words.push_back(word); }
        fit(words);
    }
}
